"""Models are saved and loaded strictly, in a folder or Hub repository of `config.json` and `model.safetensors`."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar

import huggingface_hub
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, constants
from huggingface_hub.errors import RepositoryNotFoundError
from torch import Tensor, nn

from .arguments import check_flag, check_kind, check_path
from .files import hash_file, read_json, read_safetensors, read_shapes, staged, write_safetensors
from .ledger import Measured, check_name

T = TypeVar("T")

CONFIG, WEIGHTS, CARD = constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, "README.md"
KINDS: dict[str, dict[str, Any]] = {"model": {}, "space": {"repo_type": "space", "space_sdk": "gradio"}}
MAX_CONFIG_BYTES, MAX_BYTES = 16 << 20, 8 << 30  # of a configuration, and of weights


class HubOptions(TypedDict, total=False):
    """`from_pretrained` has these options beside the arguments of the model."""

    force_download: bool
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    revision: str | None
    map_location: str | torch.device


class StrictHubMixin(PyTorchModelHubMixin):
    """This `PyTorchModelHubMixin` loads all of a checkpoint or nothing, and saves all of it or nothing.

    The mixin's own `from_pretrained` leaves a missing tensor at its random values (`strict=False`), and ignores
    settings that the class does not know. `config.json` holds the arguments of `__init__`.
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
        **model_kwargs: Any,
    ) -> Self:
        """Load a model from a folder that `save_pretrained` wrote, or from a Hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, "organisation/name", or "organisation/name@revision".
            force_download, token, cache_dir, local_files_only, revision: see `huggingface_hub.hf_hub_download`.
            map_location: the device.
            model_kwargs: arguments of `__init__`, which win over the saved ones.

        The files need not be trusted: no code in them runs, nothing else is downloaded, and the names and shapes of
        all tensors are compared before the model takes memory.

        Raises:
            ValueError: a file is missing or damaged, or does not fit the class; the message names each wrong tensor.
            OSError: the Hub cannot be reached, refuses, or has no such repository or file.
        """
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise ValueError(
                "pretrained_model_name_or_path must be a folder or 'organisation/name', got "
                f"{type(pretrained_model_name_or_path).__name__}"
            )
        check_flag("force_download", force_download)
        check_flag("local_files_only", local_files_only)
        for name, value, kinds in (("token", token, (str, bool)), ("revision", revision, str)):
            if value is not None:
                check_kind(name, value, kinds, "a text")
        if cache_dir is not None:
            check_path("cache_dir", cache_dir)
        map_location = as_device(map_location)
        source = str(pretrained_model_name_or_path)
        if Path(source).is_dir():
            config_file, weights_file = find_files(source)
        else:
            check_name(source)
            source, _, typed = source.partition("@")
            if typed and revision not in (None, typed):
                raise ValueError(f"revision={revision!r}: the name ends with @{typed}; leave one of them out")
            revision = typed or revision
            options = dict(
                cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token
            )
            config_file = download(source, CONFIG, revision=revision, **options)
            commit = config_file.parent.name  # a push in between must not mix two commits
            weights_file = download(source, WEIGHTS, revision=commit, **options)
        config = {**read_config(config_file, cls, model_kwargs), **model_kwargs}
        try:
            skeleton: Any = build_empty(lambda: cls(**config))  # a Module too
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from error
        check_fit(skeleton, read_shapes(weights_file), source=str(weights_file))
        model: Any = cls(**config)
        load_strict(model, read_safetensors(weights_file), source=str(weights_file))
        return model.to(map_location).eval()

    @classmethod
    def complete_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Add to a configuration what files of earlier versions lack and the defaults of `__init__` do not say."""
        return config

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save as the mixin does, but so that every file in `save_directory` is whole at any time.

        Raises:
            ValueError: the weights are not float32 or are sharded, or another `config` is given, or the tensors
                are not those of a model that is built from its `config`. Nothing is written.
        """
        check_path("save_directory", save_directory)
        refuse_config(kwargs, self)
        model: Any = self
        if wrong := sorted({str(x.dtype) for x in model.parameters()} - {"torch.float32"}):
            raise ValueError(
                f"the model has weights of {', '.join(wrong)}, and from_pretrained loads float32; "
                "call model.float() first"
            )
        refuse_what_cannot_be_loaded(model)
        if kwargs.get("push_to_hub"):
            kwargs["repo_id"] = kwargs.get("repo_id") or Path(save_directory).resolve().name
        with staged(save_directory, keep=[CARD]) as folder:
            return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        write_safetensors(self.state_dict(), save_directory / WEIGHTS)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push as the mixin does, with `repo_id` in the example of the card.

        Raises:
            ValueError: `private` is asked for, but the repository is there and public; or see `save_pretrained`.
            OSError: the Hub cannot be reached, or refuses.
        """
        check_kind("repo_id", repo_id, str, "a text, 'organisation/name'")
        refuse_config(kwargs, self)
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        with connected(repo_id):
            if kwargs.get("private"):
                create_private(repo_id, kwargs.get("token"))
            return super().push_to_hub(repo_id, **kwargs)

    def generate_model_card(self: Any, **facts: object) -> ModelCard:
        """Make a model card of what the model knows of itself and further `facts`, see `model_card`."""
        info, config = self._hub_mixin_info, self._hub_mixin_config
        known: dict[str, object] = {
            "architecture": f"{type(self).__name__} on {config['backbone']}",
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }
        return model_card({**known, **facts}, info.model_card_data)


def as_device(map_location: str | torch.device) -> torch.device:
    """Return the device of this name. Raises `ValueError` where there is none."""
    try:
        return torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"map_location={map_location!r:.200}: {str(error).splitlines()[0]}") from error


def refuse_options(source: str, options: Mapping[str, Any], kind: str) -> None:
    """Raise `ValueError` if there are options of the Hub for a source of another kind."""
    if given := [name for name, value in options.items() if value not in (None, False)]:
        raise ValueError(f"{source} is {kind}, for which there is no {' or '.join(given)}; leave it out")


def refuse_config(options: Mapping[str, Any], model: Any) -> None:
    """Raise `ValueError` if the options of the mixin hold a configuration that is not the model's own."""
    if options.get("config") not in (None, model._hub_mixin_config):
        raise ValueError("config: the model's own is saved, with which from_pretrained builds it; leave config out")


def refuse_what_cannot_be_loaded(model: Any) -> None:
    """Raise `ValueError` unless `from_pretrained` can build a model of this configuration, and load these weights."""
    state_dict = model.state_dict()
    if any(hasattr(tensor, "full_tensor") for tensor in state_dict.values()):  # a DTensor
        raise ValueError(
            "the model's weights are sharded, as by FSDP2; on all ranks call torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), load the "
            "result into an unsharded model on one rank, and save that model"
        )
    try:
        skeleton = build_empty(lambda: type(model)(**model._hub_mixin_config))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"from_pretrained could not build the model from its config, so nothing was saved: {error}"
        ) from error
    shapes = {key: list(tensor.shape) for key, tensor in state_dict.items()}
    if problems := differences(skeleton, shapes, "a model of the config"):
        raise ValueError(
            "from_pretrained could not load the model, so nothing was saved; its config describes another one:"
            f"{_listed(problems)}"
        )


def find_files(folder: str | Path) -> tuple[Path, Path]:
    """Find the configuration and the weights in the folder of a saved model.

    Raises:
        ValueError: one is missing; the message names saved models in folders of the folder, as a training run has.
    """
    folder = Path(folder)
    files = folder / CONFIG, folder / WEIGHTS
    for file in files:
        if not file.is_file():
            inside = sorted(
                str(path.parent) for path in folder.glob(f"*/{WEIGHTS}") if (path.parent / CONFIG).is_file()
            )
            hint = f"there is one in {', '.join(inside[:5])}" if inside else "is it the folder of a saved model?"
            if (folder / "pytorch_model.bin").is_file():
                hint = (
                    "pytorch_model.bin may run code, and is not read; save with safetensors (safe_serialization=True)"
                )
            raise ValueError(f"{folder} has no {file.name}: {hint}")
    return files


def read_config(path: Path, cls: type[StrictHubMixin], known: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of a class from a JSON file, except the arguments that are `known`.

    Raises:
        ValueError: the class does not know an argument, or needs one that is not in the file, or the backbone is not
            a plain name, but tells timm to look into another repository or folder; or a number of classes is known, and
            the file says another.
    """
    config = cls.complete_config(read_json(path, MAX_CONFIG_BYTES))
    parameters = inspect.signature(cls).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := required - config.keys() - set(known):
        hint = "is it the config of a detector of vovnet_zoo?"
        if "architecture" in config:  # timm's word
            hint = "it is the config of a classifier, which timm.create_model opens, and create_detector(backbone=) too"
        raise ValueError(f"{path} has no {sorted(missing)}: {hint}")
    if unknown := config.keys() - parameters.keys():
        raise ValueError(f"{path}: {cls.__name__} has no {sorted(unknown)}; was it saved by a newer vovnet_zoo?")
    classes, asked = config.get("num_classes"), known.get("num_classes")
    if classes is not None and asked not in (None, classes):
        raise ValueError(
            f"num_classes={reprlib.repr(asked)}: the model has {classes} ({path}); load it without num_classes, and "
            "model.reset_classifier(num_classes) lets it learn others"
        )
    config = {name: value for name, value in config.items() if name not in known}
    backbone = config.get("backbone", "")
    if isinstance(backbone, str) and not re.fullmatch(r"[\w.-]*", backbone):
        raise ValueError(
            f"{path} asks for the backbone {backbone!r:.200}, which is no name of timm's registry: refused. "
            "If you trust it, give it yourself: from_pretrained(..., backbone=...)"
        )
    return config


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy `state_dict` into `model`; `source` names the file in error messages.

    Raises:
        ValueError: a name, shape or dtype differs; the message lists the differences, and nothing was copied.
    """
    check_fit(model, {key: list(tensor.shape) for key, tensor in state_dict.items()}, source)
    own = model.state_dict()
    _refuse(
        model,
        source,
        [
            f"dtype: {key} is {theirs.dtype}, the model has {own[key].dtype}"
            for key, theirs in state_dict.items()
            if theirs.dtype != own[key].dtype
        ],
    )
    model.load_state_dict(state_dict, strict=True)


def check_fit(model: nn.Module, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Compare the names and shapes of tensors with a model's. Raises ValueError, with a list, if they differ."""
    _refuse(model, source, differences(model, shapes))


def differences(model: nn.Module, shapes: Mapping[str, Sequence[int]], name: str = "the model") -> list[str]:
    """List where the names and shapes of tensors differ from a model's, which the lines call `name`."""
    own = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    problems = [f"missing: {key}" for key in own.keys() - shapes.keys()]
    problems += [f"unexpected: {key:.200}" for key in shapes.keys() - own.keys()]
    for key in own.keys() & shapes.keys():
        if own[key] != shapes[key]:
            problems.append(f"shape: {key} is {shapes[key]}, {name} has {own[key]}")
    return problems


NOT_ON_META = ("with Meta tensors", "unsupported scalarType")  # in errors of torch 2.11 and timm 1.0.21


def build_empty(build: Callable[[], T]) -> T:
    """Build a model whose tensors take no memory, or with memory if it is one of the few that cannot be built so."""
    try:
        with torch.device("meta"):
            return build()
    except (ValueError, RuntimeError) as error:
        if not any(text in str(error) for text in NOT_ON_META):
            raise
    return build()


def _refuse(model: nn.Module, source: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}; nothing was loaded:{_listed(problems)}")


def _listed(problems: list[str]) -> str:
    shown = "".join(f"\n  {problem}" for problem in sorted(problems)[:20])
    return shown + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")


def download(repo_id: str, filename: str, **options: Any) -> Path:
    """Get a file of a Hub repository from the cache or the Hub, and check its content against the Hub's hash.

    `options` are passed to `huggingface_hub.hf_hub_download`, which itself checks only the size.

    Raises:
        OSError: the repository, revision or file does not exist, or there is no access or no connection.
        ValueError: `repo_id` is no name of a repository, the file has more than 8 GiB (16 MiB for a configuration), or
            the content does not have the Hub's hash; the file is then removed from the cache, so that the next call
            downloads it again.
    """
    limit = MAX_BYTES if filename == WEIGHTS else MAX_CONFIG_BYTES
    try:
        options = ask_first(repo_id, filename, limit, **options)
        path = Path(huggingface_hub.hf_hub_download(repo_id, filename, **options))
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no folder here, and no 'organisation/name' on the Hub") from error
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            f"{repo_id}: there is no such folder here; as a name on the Hub, its {filename} is not in the cache, and "
            f"the Hub at {constants.ENDPOINT} did not help: {reason}"
        ) from error
    except huggingface_hub.errors.HfHubHTTPError as error:  # a refusal of the Hub says what was wrong there
        if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            error.append_to_message(f"\n{repo_id} is no folder here either.")
        raise
    except (huggingface_hub.errors.HTTPError, OSError) as error:  # other errors do not
        reason = str(error) or type(error).__name__
        raise OSError(f"{repo_id}: could not get {filename} ({reason}); nothing was loaded, try again") from error
    if path.stat().st_size > limit:
        raise ValueError(f"{repo_id}: {filename} has {path.stat().st_size} bytes, more than {limit}: refused")
    if not path.is_symlink():  # on a file system without links, the cache does not keep the hash
        return path
    blob = Path(os.readlink(path))
    expected, blob = blob.name, path.parent / blob
    if len(expected) == 64:
        found = hash_file(blob)
    elif len(expected) == 40:  # for a small file the Hub tells git's hash
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
        with open(blob, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
    else:
        return path
    if found != expected:
        path.unlink()
        blob.unlink()
        raise ValueError(
            f"{repo_id}: {filename} has the hash {found}, the Hub says {expected}; it was removed, try again"
        )
    return path


def download_weights(repo_id: str) -> Path | None:
    """Get the weights of a Hub repository, see `download`; None if they are in a file of another name there."""
    try:
        return download(repo_id, WEIGHTS)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise
    except huggingface_hub.errors.EntryNotFoundError:
        return None


def ask_first(
    repo_id: str,
    filename: str,
    limit: int,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Ask the Hub for the size of a file before it is downloaded, and return the arguments for the download.

    Where the Hub cannot be reached, only the cache is left: `hf_hub_download` itself would try again for 23 seconds.

    Raises:
        ValueError: the file has more than `limit` bytes.
    """
    cache_only = {**options, "revision": revision, "local_files_only": True}
    if local_files_only or constants.HF_HUB_OFFLINE:
        return cache_only
    try:
        url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
        size = huggingface_hub.get_hf_file_metadata(url, token=options.get("token")).size
    except huggingface_hub.errors.HfHubHTTPError:  # the download meets it too, and says more
        size = None
    except (huggingface_hub.errors.HTTPError, OSError) as error:
        if options.get("force_download"):
            raise
        try:
            huggingface_hub.hf_hub_download(repo_id, filename, **cache_only)
        except huggingface_hub.errors.LocalEntryNotFoundError as missing:
            raise missing from error
        return cache_only
    if size is not None and size > limit:
        raise ValueError(f"{repo_id}: {filename} has {size} bytes, more than {limit}: refused, nothing was downloaded")
    return {**options, "revision": revision, "local_files_only": False}


@contextlib.contextmanager
def connected(repo_id: str) -> Iterator[None]:
    """Within this context, a connection to the Hub that fails raises `OSError` with a message of one line."""
    try:
        yield
    except huggingface_hub.errors.HfHubHTTPError:  # the Hub says what was wrong
        raise
    except huggingface_hub.errors.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"{repo_id}: the Hub at {constants.ENDPOINT} cannot be reached ({reason}); try again") from error


def create_private(repo_id: str, token: str | None) -> str:
    """Make a private repository of a model, or see that the one that is there is private, and return its full name.

    The Hub itself ignores `private` for a repository that is there.

    Raises:
        ValueError: the repository is public.
    """
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=True, exist_ok=True, **KINDS["model"]).repo_id
    if not is_private(repo_id, token, "model"):
        raise public_error(repo_id, "model")
    return repo_id


def is_private(repo_id: str, token: str | None, kind: Literal["model", "space"]) -> bool | None:
    """Say whether a repository is private; None where there is none that the owner of the token may see."""
    try:
        return bool(huggingface_hub.HfApi(token=token).repo_info(repo_id, repo_type=kind).private)
    except RepositoryNotFoundError:
        return None


def public_error(repo_id: str, kind: str) -> ValueError:
    """Make the error of a repository that is public, and was to be private."""
    return ValueError(
        f"the {kind} {repo_id} is there already and public, so nothing was pushed; make it private in its settings, "
        "choose another name, or leave the wish for a private repository out"
    )


def model_card(facts: Mapping[str, object], data: ModelCardData) -> ModelCard:
    """Make the README.md of a model.

    Args:
        facts: the rows of its table; `repo_id` goes into the title and the example, `license` into the header, and so
            does `measured`, if it is a `Measured`, as the model-index that the Hub reads.
        data: the header; its `library_name` and `pipeline_tag` choose the example.
    """
    known: dict[str, Any] = {"repo_id": "organisation/name", "license": data.license, **facts}
    repo_id = re.sub(r"[^\w./-]", "-", known.pop("repo_id"))
    header = ModelCardData(**{**data.to_dict(), "license": known["license"]})
    if isinstance(measured := known.get("measured"), Measured):
        header.model_name = repo_id.split("/")[-1]
        header.eval_results = [
            EvalResult(str(data.pipeline_tag), measured.dataset.lower(), measured.dataset, name, value)
            for name, value in measured.metrics.items()
        ]
    rows = "\n".join(f"| {_as_text(key).replace('_', ' ')} | {_as_text(value)} |" for key, value in known.items())
    example = USAGE[str(data.library_name), str(data.pipeline_tag)].format(repo_id=repo_id)
    return ModelCard(
        f"---\n{header.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n"
        f"```python\n{example}```\n\n| | |\n|---|---|\n{rows}\n"
    )


def _as_text(value: object) -> str:
    """Write a value so that a page of Markdown shows it as it is, in one line."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"[|`*<>\[\]\\&$~]", lambda match: f"&#{ord(match[0])};", text)


USAGE = {
    ("vovnet_zoo", "object-detection"): """\
import vovnet_zoo

model = vovnet_zoo.FCOS.from_pretrained("{repo_id}")
(found,) = vovnet_zoo.predict(model, "photo.jpg")
print(found.names, found["boxes"], found["scores"])  # boxes (x1, y1, x2, y2) in pixels
""",
    ("vovnet_zoo", "image-feature-extraction"): """\
import timm
import vovnet_zoo  # registers VoVNet with timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)
""",
    ("vovnet_zoo", "image-classification"): """\
import timm
import vovnet_zoo  # registers VoVNet with timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
""",
    ("timm", "image-classification"): """\
import timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
""",
}
