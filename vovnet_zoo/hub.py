"""Saving, loading and sharing models, strictly: a folder or Hub repository of `config.json` and `model.safetensors`."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import inspect
import json
import os
import re
import shutil
import stat
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData, PyTorchModelHubMixin, constants
from torch import Tensor, nn

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError)
CONFIG, WEIGHTS, CARD = constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, "README.md"


class StrictHubMixin(PyTorchModelHubMixin):
    """`PyTorchModelHubMixin` that loads all of a checkpoint or nothing, and saves all of it or nothing.

    The mixin's own `from_pretrained` defaults to `strict=False`, which leaves a missing tensor as random noise, and
    passes over settings that the class does not know. `config.json` holds the arguments of `__init__`.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **model_kwargs,
    ):
        """The model in a folder that `save_pretrained` wrote, or in a Hub repository; in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or "organisation/name".
            force_download, token, cache_dir, local_files_only, revision: as for `huggingface_hub.hf_hub_download`.
            map_location: the device.
            model_kwargs: arguments of `__init__` that win over those saved.

        Raises:
            ValueError: a file is missing or damaged, or does not fit the class; every tensor at fault is named.
            OSError: the Hub cannot be reached, refuses, or has no such repository or file.
        """
        source = str(pretrained_model_name_or_path)
        if Path(source).is_dir():
            config_file, weights_file = Path(source) / CONFIG, Path(source) / WEIGHTS
            for file in (config_file, weights_file):
                if not file.is_file():
                    raise ValueError(f"{source} has no {file.name}: is it the folder of a saved model?")
        else:
            options = dict(
                cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token
            )
            config_file = download(source, CONFIG, revision=revision, **options)
            commit = config_file.parent.name  # both files of one commit, even if another is made meanwhile
            weights_file = download(source, WEIGHTS, revision=commit, **options)
        model = cls(**{**read_config(config_file, cls), **model_kwargs})
        load_strict(model, read_safetensors(weights_file), source=str(weights_file))
        return model.to(map_location).eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> str | None:
        """As the mixin's, but a file that is there is whole: `save_directory` is never seen half written."""
        if kwargs.get("push_to_hub"):
            kwargs["repo_id"] = kwargs.get("repo_id") or Path(save_directory).resolve().name
        with staged(save_directory) as folder:
            return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_safetensors(self.state_dict(), save_directory / WEIGHTS)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As the mixin's, with `repo_id` in the card's example."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **kwargs)

    def generate_model_card(self, **facts) -> ModelCard:
        """`facts`: see `model_card`."""
        info, config = self._hub_mixin_info, self._hub_mixin_config
        known = {
            "architecture": f"{type(self).__name__} on {config['backbone']}",
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }
        return model_card({**known, **facts}, info.model_card_data)


# ---- files


def read_config(path: Path, cls: type) -> dict:
    """The arguments of `cls` in a JSON file. `ValueError` unless `cls` knows them all, and needs no others."""
    config = read_json(path)
    known = inspect.signature(cls).parameters
    if unknown := config.keys() - known.keys():
        raise ValueError(f"{path}: {cls.__name__} has no {sorted(unknown)}; was it saved by a newer vovnet_zoo?")
    required = {name for name, parameter in known.items() if parameter.default is parameter.empty}
    if missing := required - config.keys():
        raise ValueError(f"{path} has no {sorted(missing)}: is it the config of a {cls.__name__}?")
    return config


def read_json(path: Path) -> dict:
    """The object in a JSON file. `ValueError` if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error}); download or save it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, not settings")
    return config


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """State dict of a safetensors file, on the CPU. `ValueError` naming the file if it is damaged.

    The format has no checksum of its own: one that `write_safetensors` left in the metadata is compared.
    """
    try:
        expected = read_metadata(path).get("sha256")
        state_dict = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
    if expected is not None and expected != fingerprint(state_dict):
        raise ValueError(f"{path} is damaged: its tensors are not those saved; download or save it again")
    return state_dict


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `write_safetensors` wrote beside the tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_safetensors(state_dict: Mapping[str, Tensor], path: str | Path, **metadata: str) -> None:
    """Write a state dict, with a checksum of it among the metadata."""
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {"format": "pt", **metadata, "sha256": fingerprint(state_dict)}
    safetensors.torch.save_file(state_dict, path, metadata=metadata)


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, whatever the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy `state_dict` into `model`: the same names, shapes and dtypes, or `ValueError` naming every difference."""
    own = model.state_dict()
    problems = [f"missing: {key}" for key in own.keys() - state_dict.keys()]
    problems += [f"unexpected: {key}" for key in state_dict.keys() - own.keys()]
    for key in own.keys() & state_dict.keys():
        ours, theirs = own[key], state_dict[key]
        if ours.shape != theirs.shape:
            problems.append(f"shape: {key} is {list(theirs.shape)}, the model has {list(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"dtype: {key} is {theirs.dtype}, the model has {ours.dtype}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source} does not fit {type(model).__name__}; nothing was loaded:\n  {shown}{more}")
    model.load_state_dict(state_dict, strict=True)


def read_checkpoint(path: str | Path, source: str | None = None):
    """What `torch.save` wrote to a file, or to the only file in a zip; no code in it is run.

    `ValueError`, naming `source` or the file, if it is damaged, or holds more than tensors and plain values.
    """
    path, source = Path(path), source or str(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with unwrapped(path, source) as file:
        check_parts(file, source)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # on hostile bytes the unpickler raises anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                reason = f"it holds more than tensors: reading it would run {wanted[1]}, which is refused"
            raise ValueError(f"{source} is not a whole checkpoint of tensors ({reason}); get it anew") from error


@contextlib.contextmanager
def unwrapped(path: Path, source: str) -> Iterator[Path]:
    """The checkpoint at `path`, or the only file in the zip there."""
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    if not _is_wrapped(path, source):
        yield path
        return
    with temporary(path) as inner:
        unzip(path, inner, source)
        yield inner


def check_parts(path: Path, source: str) -> None:
    """`ValueError` if a part of a checkpoint does not have its checksum.

    torch.save leaves them, since 1.6; torch.load does not look at them.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{source} is not a whole PyTorch checkpoint ({error}); download or save it again") from error
    if broken:
        raise ValueError(f"{source}: its part {broken} is damaged; download or save it again")


@contextlib.contextmanager
def staged(target: str | Path) -> Iterator[Path]:
    """A new folder beside `target` to write into; afterwards `target` has its files, each of them whole.

    A new `target` appears at once. In one that is there, each file is replaced; a README.md there is kept.
    """
    target = Path(target).resolve()
    with temporary(target) as folder:
        folder.mkdir(parents=True)
        yield folder
        if not target.exists():
            os.rename(folder, target)
            return
        if (target / CARD).exists():
            (folder / CARD).unlink(missing_ok=True)
        for file in folder.iterdir():
            os.replace(file, target / file.name)


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A free path beside `target`; what is there afterwards is removed."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


# ---- weights that others made: tables of `name.tag`, and getting what they name


@dataclass(frozen=True)
class Weights:
    """A row of a weight table: what is known of the weights called `name.tag`."""

    state: str  # "hub": a repository of ORGANISATION; "url": at `url`; "gone": `url` is said to refuse; "unpublished"
    url: str = ""
    sha1: str = ""  # of the .pth file, which may come in a zip
    license: str = "not stated"
    score: str = ""  # as published, with the place
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per RGB channel, for pixels in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] = (224, 224)  # height and width; for a detector shorter and longest side
    interpolation: str = "bilinear"


ORGANISATION, ORGANISATION_VARIABLE = "vovnet-zoo", "VOVNET_ZOO_ORG"


def find(name: str, table: Mapping[str, Weights], how_to_make: str) -> tuple[str, str | None]:
    """The key of `table` that `name`, with or without a tag, stands for, and the Hub repository of these weights.

    The repository is None if they come from their url, which is tried for a "gone" row only by its full name. If the
    environment variable VOVNET_ZOO_ORG names an organisation, all weights are taken from that one's repositories.

    Raises:
        ValueError: they are not published; says what is, and how to make them.
    """
    keys = [key for key in table if name in (key, key.split(".")[0])]
    if keys and (organisation := os.environ.get(ORGANISATION_VARIABLE)):
        return keys[0], f"{organisation}/{keys[0]}"
    for key in keys:
        if table[key].state == "hub":
            return key, f"{ORGANISATION}/{key}"
        if table[key].state == "url" or (table[key].state == "gone" and key == name):
            return key, None
    there = [key for key in table if available(key, table)]
    message = [f"no weights of {name!r} are published yet. There are: {', '.join(there) or 'none'}."]
    for key, row in table.items():
        if row.state == "gone" and key.split(".")[0] == name.split(".")[0]:
            message.append(f"{key!r} is tried at {row.url}, which third parties report to answer 403.")
    message.append(f"To make them, {how_to_make}. To load what you publish, set {ORGANISATION_VARIABLE} to where.")
    raise ValueError("\n".join(message))


def available(key: str, table: Mapping[str, Weights]) -> bool:
    """Whether `find` gives a source for a key of `table` that is not known to refuse."""
    return bool(os.environ.get(ORGANISATION_VARIABLE)) or table[key].state in ("hub", "url")


def fetch(url: str, sha1: str = "", cache_dir: str | Path | None = None) -> Path:
    """The checkpoint at `url`, or in the zip there, as a file in the cache (torch.hub's unless `cache_dir`).

    Its `sha1`, if given, or else its parts' checksums are compared on every call, and what fails is downloaded again.
    (torch.hub's own download takes a truncated body for a whole one, and keeps it.)

    Raises:
        ConnectionError: the server cannot be reached, refuses, or breaks off.
        ValueError: what it sent is damaged, wants to run code, or is not what `sha1` says; nothing is kept.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(urlparse(url).path).name.removesuffix(".zip").removesuffix(".tar").removesuffix(".pth")
    target = folder / f"{base}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.pth"
    if target.exists():
        with contextlib.suppress(ValueError):
            _check(target, sha1, url)
            return target
    with temporary(target) as body:
        _http_get(url, body)
        with unwrapped(body, url) as whole:
            _check(whole, sha1, url)
            read_checkpoint(whole, url)
            os.replace(whole, target)
    return target


def _check(path: Path, sha1: str, source: str) -> None:
    if not sha1:
        check_parts(path, source)
    elif (found := hash_file(path, "sha1")) != sha1:
        raise ValueError(f"{source}: the checkpoint's sha1 is {found}, expected {sha1}; nothing was kept, try again")


def _http_get(url: str, path: Path) -> None:
    try:
        with urlopen(Request(url, headers={"User-Agent": "vovnet_zoo"}), timeout=60) as response, open(path, "wb") as f:
            shutil.copyfileobj(response, f)
            length = response.headers.get("Content-Length")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: {error}; nothing was kept, try again or get the file elsewhere") from error
    if length is not None and int(length) != path.stat().st_size:
        raise ConnectionError(
            f"{url}: the server broke off after {path.stat().st_size} of {length} bytes; nothing was kept, try again"
        )


def unzip(path: Path, target: Path, source: str) -> None:
    """Write the only file of a zip to `target`. `ValueError` if there are more, or its name is a path."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != 1:
                raise ValueError(f"{source}: a zip of {len(members)} files; expected one checkpoint")
            name, mode = members[0].orig_filename, members[0].external_attr >> 16
            if re.search(r"[/\\:\0]", name) or name in ("", ".", "..") or stat.S_ISLNK(mode):
                raise ValueError(f"{source}: the zip's member {name!r} is a path or a link, not a plain file: refused")
            with archive.open(members[0]) as member, open(target, "wb") as file:
                shutil.copyfileobj(member, file)  # compares the checksum at the end
    except ZIP_ERRORS as error:
        raise ValueError(f"{source} is not a whole zip file ({error}); download it again") from error


def _is_wrapped(path: Path, source: str) -> bool:
    """Whether the file is a zip of something, rather than a checkpoint, which may be a zip too."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("/data.pkl") for name in archive.namelist())
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{source} is not a whole file ({error}); download or save it again") from error


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# ---- the Hub


def download(repo_id: str, filename: str, **options) -> Path:
    """A file of a Hub repository, from the cache or downloaded, its content checked against the Hub's hash.

    `options`: of `huggingface_hub.hf_hub_download`, which checks no more than the size.

    Raises:
        OSError: no such repository, revision or file, no access, no connection.
        ValueError: `repo_id` is no name of a repository, or the content is not what the Hub says; it is then removed
            from the cache, so that the next call downloads it again.
    """
    try:
        path = Path(huggingface_hub.hf_hub_download(repo_id, filename, **options))
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no folder here, and no 'organisation/name' on the Hub") from error
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            f"{repo_id}: {filename} is not in the cache, and the Hub at {constants.ENDPOINT} did not help: {reason}"
        ) from error
    except huggingface_hub.errors.HfHubHTTPError:  # the Hub's refusals, which say what and where
        raise
    except (huggingface_hub.errors.HTTPError, OSError) as error:  # the HTTP library's and the system's, which do not
        reason = str(error) or type(error).__name__
        raise OSError(f"{repo_id}: could not get {filename} ({reason}); nothing was loaded, try again") from error
    if not path.is_symlink():  # a cache on a file system without links: nothing to compare with
        return path
    blob = Path(os.readlink(path))
    expected, blob = blob.name, path.parent / blob
    if len(expected) == 64:
        found = hash_file(blob)
    elif len(expected) == 40:  # a small file: git's hash
        found = hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest()
    else:
        return path
    if found != expected:
        path.unlink()
        blob.unlink()
        raise ValueError(
            f"{repo_id}: {filename} has the hash {found}, the Hub says {expected}; it was removed, try again"
        )
    return path


def push(
    repo_id: str,
    folder: str | Path,
    card: ModelCard,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a model's files in one commit, making the repository where there is none; returns the commit's address."""
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = {CONFIG: Path(folder) / CONFIG, WEIGHTS: Path(folder) / WEIGHTS, CARD: str(card).encode()}
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
        commit_message="Publish with vovnet_zoo",
        revision=branch,
        create_pr=create_pr,
    )
    return commit.commit_url


def model_card(facts: Mapping[str, str], data: ModelCardData) -> ModelCard:
    """A README.md.

    Args:
        facts: the rows of its table; `repo_id` goes into the title and the example, `license` into the header.
        data: the header. Its `library_name` chooses the example.
    """
    facts = {"repo_id": "organisation/name", "license": data.license, **facts}
    repo_id = facts.pop("repo_id")
    header = ModelCardData(**{**data.to_dict(), "license": facts["license"]})
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    return ModelCard(
        f"---\n{header.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n"
        f"```python\n{USAGE[data.library_name].format(repo_id=repo_id)}```\n\n| | |\n|---|---|\n{rows}\n"
    )


BACKBONE_CARD = ModelCardData(
    library_name="timm", pipeline_tag="image-classification", tags=["timm", "vovnet"], license="apache-2.0"
)
USAGE = {
    "vovnet_zoo": """\
import vovnet_zoo

model = vovnet_zoo.FCOS.from_pretrained("{repo_id}")
print(vovnet_zoo.predict(model, "photo.jpg"))  # boxes (x1, y1, x2, y2) in pixels, scores, labels
""",
    "timm": """\
import timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
""",
}
