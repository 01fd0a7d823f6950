// Detect objects with torch's C++ library alone: detect_pt2 model.pt2 image.ppm
//
// export.md has the command that compiles this file. The image is a binary PPM of 8 bits (P6), whole or smaller than
// the size that the model was exported for.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// Read a PPM file as uint8 [3,H,W], red first.
torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, most = 0;
  if (!(file >> kind >> width >> height >> most) || kind != "P6" || most != 255)
    throw std::runtime_error(path + " is not a binary PPM file of 8 bits without comments");
  file.get();  // one white space
  auto pixels = torch::empty({height, width, 3}, torch::kUInt8);
  if (!file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel()))
    throw std::runtime_error(path + " ends too early");
  return pixels.permute({2, 0, 1});
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: detect_pt2 model.pt2 image.ppm\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  auto facts = model.get_metadata();
  std::vector<std::string> names;
  std::istringstream lines(facts["class_names"]);
  for (std::string name; std::getline(lines, name);) names.push_back(name);

  auto image = read_ppm(argv[2]);
  int64_t height = image.size(1), width = image.size(2);
  auto padded = [](int64_t side) { return std::max<int64_t>(64, (side + 31) / 32 * 32); };
  int64_t rows = padded(height), columns = padded(width);
  std::sscanf(facts["size"].c_str(), "[%ld, %ld]", &rows, &columns);  // "null" where any size will do
  auto images = torch::zeros({1, 3, rows, columns}, torch::kUInt8);
  images[0].narrow(1, 0, height).narrow(2, 0, width).copy_(image);
  auto sizes = torch::tensor({{height, width}}, torch::kInt64);

  c10::InferenceMode guard;
  auto found = model.run({images, sizes});
  auto boxes = found[0][0], scores = found[1][0], labels = found[2][0];
  for (int64_t i = 0; i < found[3][0].item<int64_t>(); i++) {
    auto label = labels[i].item<int64_t>();
    std::cout << (names.empty() ? std::to_string(label) : names[label]) << " " << scores[i].item<float>();
    for (int64_t k = 0; k < 4; k++) std::cout << " " << boxes[i][k].item<float>();
    std::cout << "\n";
  }
}
