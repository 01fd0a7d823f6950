"""A checkpoint on its way to the Hub is converted, checked, described by a card, and pushed."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import huggingface_hub
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import detectors, hub, vovnet
from .arguments import check_choice, check_flag, check_kind, check_path
from .classifiers import build_for_timm, load_for_timm
from .convert import FORMS, PARTS, convert
from .fcos import FCOS
from .files import free_to_write, hash_file, read_json, read_metadata, staged, write_safetensors
from .ledger import BACKBONE_WEIGHTS, DETECTOR_WEIGHTS, Measured, Weights
from .space import write_space
from .weights import read_checkpoint, unwrapped
from .words import counted

SECRET = re.compile("token|password|passwd|secret|credential|api.?key", re.IGNORECASE)  # in the name of an option
BACKBONE_CARD = ModelCardData(
    library_name="timm", pipeline_tag="image-classification", tags=["timm", "vovnet"], license="apache-2.0"
)
CLASSIFIER_CARD, BODY_CARD = (
    ModelCardData(library_name="vovnet_zoo", pipeline_tag=tag, tags=["timm", "vovnet"], license="apache-2.0")
    for tag in ("image-classification", "image-feature-extraction")
)


class PushOptions(TypedDict, total=False):
    """`push` has these further arguments."""

    private: bool
    token: str | None
    branch: str | None
    create_pr: bool


def publish_model(
    source: str | Path,
    repo_id: str,
    *,
    run: str | Path | None = None,
    license: str | None = None,
    space: bool = False,
    **options: Unpack[PushOptions],
) -> str:
    """Check a model, write its card, push both to the Hub, and return the address of the commit.

    With `space`, the address of the Space's commit follows in a second line. What the Hub may refuse about either of
    the two, it refuses before the first commit.

    Args:
        source: the folder of a saved detector or backbone, or a published checkpoint, which is converted first.
        repo_id: "organisation/name"; the repository is made if it does not exist.
        run: folder of the training run, whose scores go into the card; None takes the folder around `source`.
        license: the license of the weights, as the Hub abbreviates it; None takes the one that is known, if any.
        space: push a Space of the same name too, see `write_space`: a page to try a detector in.
        options: `private`, `token`, `branch`, `create_pr` of `push`.

    Raises:
        ImportError: `space` needs gradio, which is not installed.
        ValueError: the model cannot be loaded or converted, or gives outputs that are not finite.
        OSError: the Hub cannot be reached, or refuses.
    """
    check_path("source", source)
    check_kind("repo_id", repo_id, str, "a text, 'organisation/name'")
    if run is not None:
        check_path("run", run)
    if license is not None:
        check_kind("license", license, str, "a text")
    check_flag("space", space)
    check_push(**options)
    source = Path(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = source
        if not folder.is_dir():
            folder = Path(temporary) / "converted"
            convert_file(source, folder)
        facts = {"repo_id": repo_id, **training_facts(Path(run or source.resolve().parent), source.name)}
        if license:
            facts["license"] = license
        card = checked_card(folder, **facts)
        parts = [_model_part(folder, card)]
        if space:
            page = Path(temporary) / "space"
            write_space(page, folder, repo_id, card.data.to_dict().get("license"))
            parts.append(_space_part(page))
        return "\n".join(_push_parts(repo_id, parts, **options))


def convert_file(file: str | Path, out: str | Path, *, part: str = "all", overwrite: bool = False) -> list[str]:
    """Convert a published checkpoint to a folder of `model.safetensors`, `config.json` and `README.md`.

    `FCOS.from_pretrained` opens the folder of a detector. `timm.create_model("local-dir:FOLDER", pretrained=True)`
    opens the folder of a classifier, also where this package is not installed, and of a VoVNetV2 body after
    `import vovnet_zoo`. The folder appears only after `checked_card` has loaded and run the model in it. A README.md
    that is there stays.

    Args:
        part: "backbone" takes a VoVNetV2 body out of a file that holds other tensors too, such as a detector's.

    Returns:
        The names of the tensors that were left out; none with `part` "all".

    Raises:
        ValueError: the file is damaged, wants to run code, or is none of `FORMS`, or a tensor does not fit, or a model
            is in `out` already and `overwrite` is False.
    """
    check_path("file", file)
    check_path("out", out)
    check_flag("overwrite", overwrite)
    check_choice("part", part, PARTS)
    file, out = Path(file), Path(out)
    free_to_write([out / hub.CONFIG, out / hub.WEIGHTS], [file], overwrite)
    with unwrapped(file, str(file)) as checkpoint_file:
        checkpoint = read_checkpoint(checkpoint_file, str(file))
        hashes = [hash_file(checkpoint_file, "sha1"), hash_file(checkpoint_file)]
    try:
        converted = convert(checkpoint, detectors.archs(), part)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    source = {"converted_from": f"{file.name}, {FORMS[converted.form]}, sha256 {hashes[1]}"}
    if converted.left_out:
        source["left_out"] = f"{counted(len(converted.left_out), 'tensor')} beside the backbone"
    for name, weights in {**BACKBONE_WEIGHTS, **DETECTOR_WEIGHTS}.items():
        if weights.sha1 == hashes[0] or weights.sha256 == hashes[1]:
            source |= {
                "known_as": name,
                "published_score": f"{weights.score} ({weights.publisher})",
                "training_data": weights.data,
                "license": weights.license,
            }
    with staged(out, keep=[hub.CARD]) as folder:
        model: nn.Module
        config: Mapping[str, object]
        if converted.config:
            model = detector = detectors.build_converted(converted)
            config = detector.config
        else:
            model, config = build_for_timm(converted.arch, converted.state_dict)
        (folder / hub.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(model.state_dict(), folder / hub.WEIGHTS, **{"license": "unknown", **source})
        card = checked_card(folder, repo_id=f"organisation/{out.name}")
        (folder / hub.CARD).write_text(str(card), encoding="utf-8")
    return list(converted.left_out)


def check_push(**options: Unpack[PushOptions]) -> None:
    """Raise `ValueError` unless options of `push` have the types that it documents."""
    if unknown := options.keys() - PushOptions.__annotations__.keys():
        raise ValueError(f"unknown {sorted(unknown)}: there are {sorted(PushOptions.__annotations__)}")
    for name, value in options.items():
        if name in ("private", "create_pr"):
            check_flag(name, value)
        elif value is not None:
            check_kind(name, value, str, "a text")


def checked_card(folder: str | Path, **facts: object) -> ModelCard:
    """Load the model in a folder strictly, run it, and make a card of what is known of it and the further `facts`.

    Raises:
        ValueError: the model cannot be loaded, or one of its outputs is not finite.
    """
    check_path("folder", folder)
    folder = Path(folder)
    config_file, _ = hub.find_files(folder)
    architecture = read_json(config_file, hub.MAX_CONFIG_BYTES).get("architecture")
    model: Any  # FCOS.generate_model_card below is no method of a classifier
    if architecture is None:
        model, name = FCOS.from_pretrained(folder), ""
        size = [-(-side // 32) * 32 for side in (model.config["min_size"], model.config["max_size"])]
    else:
        model, name = load_for_timm(folder)
        size = list(Weights("hub").size)
    with torch.inference_mode():
        outputs = model(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
        if not all(x.isfinite().all() for x in (outputs if architecture is None else [outputs])):
            raise ValueError(f"{folder}: the model runs, but not all its outputs are finite; is a tensor damaged?")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            model.to("meta")(torch.empty(1, 3, *size))
    flops, metadata = counter.get_total_flops(), read_metadata(folder / hub.WEIGHTS)
    row = {**BACKBONE_WEIGHTS, **DETECTOR_WEIGHTS}.get(metadata.get("known_as", ""))
    known = {
        **({"measured": row.measured} if row and row.measured else {}),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "compute": f"{flops / 1e9:.1f} GFLOPs ({flops / 2e9:.1f} GMACs) at {size[0]}x{size[1]}",
        **{key: text for key, text in metadata.items() if key not in ("format", "sha256")},
        "sha256_of_model.safetensors": hash_file(folder / hub.WEIGHTS),
        **facts,
    }
    if architecture is None:
        return model.generate_model_card(**known)
    if architecture in vovnet.model_cfgs:  # timm alone does not know it
        known["architecture"] = f"{name} of vovnet_zoo"
        if model.num_classes:
            return hub.model_card(known, CLASSIFIER_CARD)
        known["input"] = "as in the training of the file, which does not tell the order and the scale of its channels"
        return hub.model_card(known, BODY_CARD)
    known["architecture"] = f"{name}: timm's {architecture} with the model_args of config.json"
    if name == architecture:
        known["architecture"] = f"timm's {name}"
    return hub.model_card(known, BACKBONE_CARD)


def training_facts(run: Path, model: str) -> dict[str, object]:
    """Read what a run folder of a training recipe tells of its model "best" or "last"; {} for any other folder.

    Raises:
        ValueError: `run.json` is damaged.
    """
    if not (run / "run.json").is_file():
        return {}
    try:
        start = read_json(run / "run.json")["starts"][-1]
        facts = {
            "training_command": public_command(start["command"]),
            "training_versions": ", ".join(f"{name} {version}" for name, version in start["versions"].items()),
            "training_machine": str(start["machine"]),
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / 'run.json'} does not describe a training ({error!r}); give another run") from error
    scored = _scores(run / "metrics.jsonl")
    if model != "last":
        scored.sort(key=lambda row: row["AP"] if "AP" in row else row["top1"])
    data = "the validation split of the training data"
    return {"measured": Measured(data, scored[-1], facts["training_command"]) if scored else "not scored", **facts}


def _scores(log: Path) -> list[dict[str, float]]:
    """Read the scores in a training's log, whose lines may be cut by a crash."""
    scored = []
    for line in log.read_bytes().splitlines() if log.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            scores = {
                key: value for key, value in row.items() if re.match("AP|top", key) and isinstance(value, int | float)
            }
            scored += [scores] if {"AP", "top1"} & scores.keys() else []
    return scored


def public_command(command: list[str]) -> str:
    """Write a command line without what is nobody else's business: paths and addresses, names and passwords in them."""
    words, secret = [Path(command[0]).name], False
    for word in map(str, command[1:]):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if secret and not word.startswith("-"):
            value = "SECRET"
        elif re.search(r"\bhf_\w+|://[^/]*@", value) or (equals and SECRET.search(option)):
            value = "SECRET"
        elif "://" in value:
            value = "URL"
        elif re.search(r"[/\\@]", value):
            value = "PATH"
        secret = word.startswith("-") and not equals and bool(SECRET.search(word))
        words.append(option + equals + value)
    return shlex.join(words)


def push(
    repo_id: str,
    folder: str | Path,
    card: ModelCard | str,
    *,
    private: bool = False,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a model's files in one commit, and return the address of the commit.

    Args:
        repo_id: "organisation/name"; the repository is made if it does not exist.
        folder: the folder with `config.json` and `model.safetensors`.
        private: push to a private repository only; otherwise a new one is as the organisation wants it, or public.
        token: access token; None takes the one of `hf auth login` or `HF_TOKEN`.
        branch: branch to push to, which is made if it does not exist; None is main.
        create_pr: open a pull request instead.

    Raises:
        ValueError: `private` is asked for, but the repository is there and public.
        OSError: the Hub cannot be reached, or refuses.
    """
    check_kind("repo_id", repo_id, str, "a text, 'organisation/name'")
    check_path("folder", folder)
    check_kind("card", card, (ModelCard, str), "a ModelCard, or its text")
    check_push(private=private, token=token, branch=branch, create_pr=create_pr)
    (url,) = _push_parts(
        repo_id, [_model_part(Path(folder), card)], private=private, token=token, branch=branch, create_pr=create_pr
    )
    return url


class Part(NamedTuple):
    """The files of a part, by name, are one commit in a repository of its kind."""

    kind: Literal["model", "space"]
    files: Mapping[str, Path | bytes]


def _model_part(folder: Path, card: ModelCard | str) -> Part:
    config, weights = hub.find_files(folder)
    return Part("model", {hub.CONFIG: config, hub.WEIGHTS: weights, hub.CARD: str(card).encode()})


def _space_part(folder: Path) -> Part:
    """Take all files of a folder that `write_space` wrote."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return Part("space", {path.relative_to(folder).as_posix(): path for path in files})


def _push_parts(
    repo_id: str,
    parts: Sequence[Part],
    *,
    private: bool = False,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> list[str]:
    """Upload each part in one commit, to the repository `repo_id` of its kind, and return the commits' addresses.

    No part is committed if another one would be refused: all repositories are looked at, then made with their branch,
    then asked whether they take the files, and get the large files, before the first commit.
    """
    api = huggingface_hub.HfApi(token=token)
    with hub.connected(repo_id):
        if "/" in repo_id:  # otherwise the full name is known only when a repository was made
            _check_privacy(repo_id, parts, private, token)
        # The Space is made first, because it is refused more often: it needs an account that may run it.
        for part in reversed(parts):
            repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True, **hub.KINDS[part.kind]).repo_id
        _check_privacy(repo_id, parts, private, token)
        if branch is not None and not branch.startswith("refs/"):  # which is a pull request, and is there
            for part in reversed(parts):
                api.create_branch(repo_id, branch=branch, repo_type=part.kind, exist_ok=True)
        additions = {
            part.kind: [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in part.files.items()
            ]
            for part in parts
        }
        for kind, files in additions.items():
            api.preupload_lfs_files(
                repo_id, files, repo_type=kind, revision=branch, create_pr=create_pr, free_memory=False
            )
        commits = [
            api.create_commit(
                repo_id,
                files,
                commit_message="Publish with vovnet_zoo",
                repo_type=kind,
                revision=branch,
                create_pr=create_pr,
            )
            for kind, files in additions.items()
        ]
    return [commit.commit_url for commit in commits]


def _check_privacy(repo_id: str, parts: Sequence[Part], private: bool, token: str | None) -> None:
    """Refuse to push to what is public and is not to be.

    The Hub itself ignores `private` for a repository that is there. A Space has a copy of the weights.
    """
    there = {part.kind: hub.is_private(repo_id, token, part.kind) for part in parts}
    for kind, is_private in there.items():
        if private and is_private is False:
            raise hub.public_error(repo_id, kind)
    if "space" in there and there["model"] and not (private or there["space"]):
        raise ValueError(
            f"the model {repo_id} is private, and its weights would be public in the Space, so nothing was pushed; ask "
            "for a private Space with private=True (--private), or make the model public in its settings"
        )
