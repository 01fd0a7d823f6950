"""Videos and cameras are read frame by frame, and videos are written so that they can be played at any time."""

import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
from launch import run_python
from samples import draw_video

from vovnet_zoo import predict, video
from vovnet_zoo.sources import frames, to_rgb
from vovnet_zoo.video import Video, VideoWriter

av = pytest.importorskip("av", reason="videos need the extra `video`")


def test_frames(tmp_path):
    path = draw_video(tmp_path / "clip.mp4", 20)
    found = list(frames(path))
    assert [frame.name for frame in found] == [f"{path} frame {i}" for i in range(20)]
    for i, frame in enumerate(found):
        pixels = to_rgb(frame.image).float()
        assert pixels.shape == (3, 48, 64)
        assert abs(pixels[:, :, 40:].mean() - (40 + 4 * i)) < 3 and pixels[0, :, :24].mean() > 230
    one = Video(str(path))
    assert len(list(one.read())) == len(list(one.read())) == 20
    assert isinstance(one.rate, Fraction) and one.rate == 10
    (tmp_path / "list.txt").write_text("clip.mp4\n")
    for source in (tmp_path / "list.txt", tmp_path / "*.mp4", [path]):
        assert len(list(frames(source))) == 20


def test_rotation(tmp_path):
    """A phone held upright stores a turned picture, and the angle."""
    turned = draw_video(tmp_path / "turned.mp4", 2, rotation=90)
    (first, _) = frames(turned)
    pixels = to_rgb(first.image).float()
    assert pixels.shape == (3, 64, 48)
    red = pixels[0] - pixels[1] > 150
    assert red[36:].float().mean() > 0.95 and not red[:28].any()  # 90 degrees counterclockwise: left becomes below


def test_what_is_no_video(tiny_detector, tmp_path):
    """The error comes in the place of the next frame, so that nothing before it is lost."""
    whole = draw_video(tmp_path / "whole.mkv", 100)
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "empty.avi").write_bytes(b"")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{whole}\n#EXT-X-ENDLIST\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in stream.encode(sound):
            container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    for name in ("nosuch.mp4", "text.mp4", "empty.avi", "sound.mp4", "list.mp4"):
        errors = []
        assert not predict(
            tiny_detector, tmp_path / name, on_error=lambda frame, error, to=errors: to.append(str(error))
        )
        assert len(errors) == 1 and f"{name}: cannot read the video: " in errors[0]
        with pytest.raises(ValueError, match=f"{name}: cannot read the video"):
            predict(tiny_detector, tmp_path / name)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi", "ts"])
def test_damaged_videos(tmp_path, suffix):
    """All frames that can be decoded are there, and the last one says what is wrong."""
    whole = draw_video(tmp_path / f"whole.{suffix}", 100)
    data, middle = whole.read_bytes(), whole.stat().st_size // 2
    (tmp_path / f"bad.{suffix}").write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    (tmp_path / f"cut.{suffix}").write_bytes(data[: middle * 4 // 3])
    assert len(list(frames(whole))) == 100
    for name in ("bad", "cut"):
        if (suffix, name) == ("ts", "cut"):
            continue  # a broadcast may end at any place
        *found, last = frames(tmp_path / f"{name}.{suffix}")
        assert (suffix, name) == ("mp4", "cut") or 20 < len(found) < 100  # the index of an MP4 is at its end
        with pytest.raises(ValueError, match=rf"{name}.{suffix}: cannot read the video: .*(damaged|ends|Invalid)"):
            last.image()


def test_cameras(monkeypatch, tmp_path):
    """FFmpeg's device that draws a test picture for ever stands for a camera."""
    for system in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setitem(video.CAMERAS, system, ("lavfi", "testsrc=size=64x48:rate={}"))
        stream = frames("5")
        for i in range(3):
            frame = next(stream)
            assert frame.name == f"camera 5 frame {i}" and to_rgb(frame.image).shape == (3, 48, 64)
        stream.close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    with pytest.raises(ValueError, match="no image in this folder"):  # a file or folder of this name is no camera
        list(frames("7"))
    monkeypatch.undo()
    (broken,) = frames("999")
    with pytest.raises(ValueError, match="camera 999: cannot read the video"):
        broken.image()


def test_pyav_is_imported_only_for_videos(monkeypatch, tmp_path):
    code = "import sys, vovnet_zoo.sources as s; list(s.frames(['a.jpg'])); assert 'av' not in sys.modules"
    assert run_python(code).returncode == 0
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(list(frames("a.jpg"))) == 1
    with pytest.raises(ImportError, match=r"PyAV: pip install 'vovnet_zoo\[video\]'"):
        list(frames("clip.mp4"))


@pytest.mark.parametrize("size", [(64, 48), (65, 49)])
def test_writer(tmp_path, size):
    """What is written can be read; while the file is open already, but for the last seconds."""
    width, height = size
    (tmp_path / "out.mp4").symlink_to(tmp_path / "other")
    (tmp_path / "other").write_text("mine")
    writer = VideoWriter(tmp_path / "out.mp4", Fraction(10))
    for i in range(100):
        writer.write(np.full((height, width, 3), 50 + i, np.uint8))
    shutil.copy(tmp_path / "out.mp4", tmp_path / "killed.mp4")
    writer.close()
    assert (tmp_path / "other").read_text() == "mine"
    read = list(Video(str(tmp_path / "out.mp4")).read())
    assert len(read) == 100 and read[0].shape == (height + height % 2, width + width % 2, 3)
    assert all(abs(float(pixels.mean()) - 50 - i) < 3 for i, pixels in enumerate(read))
    assert 30 < len(list(Video(str(tmp_path / "killed.mp4")).read())) < 100


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_times_of_frames(tmp_path, monkeypatch, codec):
    """Also where the rate varies, as in videos of phones and screens; the first frame is at the start."""
    monkeypatch.setattr(av, "codecs_available", {codec})
    times = [0.0, 0.03, 0.1, 1.0, 2.0, 2.03, 5.0]
    writer = VideoWriter(tmp_path / "out.mp4", Fraction(10))
    for seconds in [*times, 5.0]:  # the second of two that are shown at once comes a moment later
        writer.write(np.zeros((48, 64, 3), np.uint8), seconds)
    writer.close()
    video = Video(str(tmp_path / "out.mp4"))
    found = [video.seconds for _ in video.read()]
    assert found == pytest.approx([*times, 5.0], abs=1e-3) and found[-1] > found[-2]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).pts == 0
    writer = VideoWriter(tmp_path / "even.mp4", Fraction(30_000, 1001))
    for _ in range(4):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.close()
    video = Video(str(tmp_path / "even.mp4"))
    assert [video.seconds for _ in video.read()] == pytest.approx([i * 1001 / 30_000 for i in range(4)], abs=1e-6)
    assert float(video.rate) == pytest.approx(30_000 / 1001)
