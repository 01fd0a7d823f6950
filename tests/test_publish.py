"""A checkpoint is converted, checked, described and pushed to the Hub."""

import json

import pytest
import timm
import torch
from checkpoints import open_with_timm, published, same
from hub_server import TOKEN, Repo
from huggingface_hub import ModelCard
from launch import run_python

import vovnet_zoo
from vovnet_zoo import cli, convert, hub, publish
from vovnet_zoo.classifiers import save_classifier
from vovnet_zoo.detectors import VARIANT_OF, VARIANTS, coco_class_names
from vovnet_zoo.files import hash_file, write_safetensors

REPO = "someone/fcos-tiny"


@pytest.mark.parametrize("kind", list(convert.FORMS))
def test_convert_file(kind, tmp_path):
    torch.save(published(kind), tmp_path / "published.pth")
    publish.convert_file(tmp_path / "published.pth", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {hub.CONFIG, hub.WEIGHTS, hub.CARD}
    card = (tmp_path / "out" / hub.CARD).read_text()
    assert hash_file(tmp_path / "published.pth") in card and str(tmp_path) not in card
    if kind in VARIANT_OF:
        model = vovnet_zoo.FCOS.from_pretrained(tmp_path / "out")
        assert model.config["class_names"] == coco_class_names() and len(coco_class_names()) == 80
        assert model.config["category_ids"] == convert.COCO_IDS and len(convert.COCO_IDS) == 80
        assert model.config.items() >= VARIANTS[VARIANT_OF[kind]].items()
    else:
        model = open_with_timm(tmp_path / "out")
        assert json.loads((tmp_path / "out" / hub.CONFIG).read_text())["pretrained_cfg"]["label_offset"] == 0
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_convert_file_leaves_nothing_on_failure(tmp_path):
    weights = published("authors")
    name = list(weights)[0]
    torch.save({**weights, name: weights[name][:-1]}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match="shape: stem.0.conv.weight"):
        publish.convert_file(tmp_path / "published.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def test_training_facts(tmp_path):
    assert publish.training_facts(tmp_path, "best") == {}
    start = dict(command=["recipes/train_coco.py", "finetune"], versions={"torch": "2.15"}, machine="x86, 2 cores")
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
    rows = [dict(step=0, loss=1.0), dict(step=1, AP=0.25, AP50=0.5), dict(step=2, AP=0.125, AP50=0.6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert str(publish.training_facts(tmp_path, "last")["measured"]) == "AP 0.125, AP50 0.600"
    facts = publish.training_facts(tmp_path, "best")
    assert str(facts["measured"]) == "AP 0.250, AP50 0.500" and facts["training_command"] == "train_coco.py finetune"


COMMANDS = {
    "/home/jane/train_coco.py finetune --data /home/jane/x --lr 0.01": "train_coco.py finetune --data PATH --lr 0.01",
    "train_coco.py scratch --data=../coco --note x": "train_coco.py scratch --data=PATH --note x",
    "train_coco.py --init https://jane:pa55@host/w.pth": "train_coco.py --init SECRET",
    "train_coco.py --init=ftp://host/w.pth": "train_coco.py --init=URL",
    "train_coco.py --out C:\\Users\\jane\\run": "train_coco.py --out PATH",
    "train_coco.py --token abc --password=abc --hub-token hf_abc --x hf_abc": (
        "train_coco.py --token SECRET --password=SECRET --hub-token SECRET --x SECRET"
    ),
    "train_coco.py --token --ema 0.5": "train_coco.py --token --ema 0.5",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_cards_command_tells_no_paths_and_no_passwords(command):
    assert publish.public_command(command.split(" ")) == COMMANDS[command]


def test_a_card_shows_texts_as_they_are(tiny_detector):
    hostile = {"a|b": "x|y\n\n# title\n<img src=//evil/x> [a](b) `c` ![d](e)\x1b[31m", "repo_id": 'me/a"\n```'}
    card = str(tiny_detector.generate_model_card(**hostile))
    (row,) = (line for line in card.splitlines() if "title" in line)
    assert row.count("|") == 3 and not set(row) & set("<>[]`\x1b") and "x&#124;y # title" in row
    assert 'from_pretrained("me/a-----")' in card and card.count("```") == 2


@pytest.mark.parametrize("how", ["publish", "push_to_hub", "save_pretrained"])
def test_private_never_becomes_public(tiny_detector, hub_on_loopback, tmp_path, how):
    hub_on_loopback.repos[REPO] = Repo(private=False)
    tiny_detector.save_pretrained(tmp_path / "model")
    options = dict(private=True, token=TOKEN)
    push = {
        "publish": lambda: publish.publish_model(tmp_path / "model", REPO, **options),
        "push_to_hub": lambda: tiny_detector.push_to_hub(REPO, **options),
        "save_pretrained": lambda: tiny_detector.save_pretrained(
            tmp_path / "model", push_to_hub=True, repo_id=REPO, **options
        ),
    }[how]
    with pytest.raises(ValueError, match=f"{REPO} is there already and public"):
        push()
    assert not hub_on_loopback.repos[REPO].commits
    del hub_on_loopback.repos[REPO]
    push(), push()
    assert hub_on_loopback.repos[REPO].private and len(hub_on_loopback.repos[REPO].commits) == 2


REFUSALS = {
    "public": (lambda server: server.repos.update({f"spaces/{REPO}": Repo(private=False)}), ValueError, "public"),
    "not mine": (lambda server: server.refused.add("someone"), OSError, "403"),
    "no Spaces": (lambda server: server.refused.add("spaces"), OSError, "402"),
    "not to be written": (
        lambda server: server.repos.update({f"spaces/{REPO}": Repo(private=True, read_only=True)}), OSError, "403"
    ),
}  # fmt: skip


@pytest.fixture
def prepared(tiny_detector, tmp_path, monkeypatch):
    """The folder of a detector, whose card and Space are made at once."""
    monkeypatch.setattr(publish, "checked_card", lambda *_, **__: ModelCard("---\nlicense: mit\n---\n"))
    monkeypatch.setattr(publish, "write_space", lambda folder, *_: folder.mkdir() or (folder / "app.py").write_text(""))
    tiny_detector.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refused_space_keeps_the_model_back(prepared, hub_on_loopback, what):
    """What the Hub refuses about the Space is known before the model is pushed."""
    options = dict(private=True, token=TOKEN, space=True)
    refuse, error, message = REFUSALS[what]
    refuse(hub_on_loopback)
    with pytest.raises(error, match=message):
        publish.publish_model(prepared, REPO, **options)
    repos = hub_on_loopback.repos
    assert not any(repo.commits for repo in repos.values()) and not any("/commit/" in x for x in hub_on_loopback.log)
    if what in ("public", "not mine", "no Spaces"):  # nor is an empty repository left behind
        assert REPO not in repos

    repos.clear(), hub_on_loopback.refused.clear()
    addresses = publish.publish_model(prepared, REPO, **options).split()
    assert [address.split("/commit/")[0] for address in addresses] == [
        f"{hub_on_loopback.url}/{name}" for name in (REPO, f"spaces/{REPO}")
    ]
    assert all(repo.private and len(repo.commits) == 1 for repo in repos.values()) and len(repos) == 2


def test_a_branch_is_made_where_it_is_not_there(run, prepared, hub_on_loopback):
    """The branch is made in the model and in the Space; one that is there stays."""
    hub_on_loopback.repos[REPO] = Repo(private=False)
    for number in (1, 2):
        line = ("publish", prepared, REPO, "--token", TOKEN, "--space", "--branch", "v2")
        status, out, err = run(*line)
        assert status == 0 and len(out.split()) == 2, err
        for name in (REPO, f"spaces/{REPO}"):
            repo = hub_on_loopback.repos[name]
            assert len(repo.commits) == number and repo.branches == {"v2": repo.commits[-1][0]}
    hub_on_loopback.log.clear()
    publish.publish_model(prepared, REPO, token=TOKEN)
    assert not any("/branch/" in line for line in hub_on_loopback.log)


def test_a_space_does_not_show_private_weights(prepared, hub_on_loopback):
    hub_on_loopback.repos[REPO] = Repo(private=True)
    with pytest.raises(ValueError, match="its weights would be public in the Space"):
        publish.publish_model(prepared, REPO, token=TOKEN, space=True)
    assert list(hub_on_loopback.repos) == [REPO] and not hub_on_loopback.repos[REPO].commits
    hub_on_loopback.repos[f"spaces/{REPO}"] = Repo(private=True)
    publish.publish_model(prepared, REPO, token=TOKEN, space=True)


def test_the_organisation_decides_if_nobody_else_does(tiny_detector, hub_on_loopback, tmp_path, monkeypatch):
    """The Hub would take `private=False` for the wish to override the rule that new repositories are private."""
    asked = []
    monkeypatch.setattr(
        publish.huggingface_hub.HfApi, "create_repo", lambda self, *args, **options: asked.append(options) or 1 / 0
    )
    tiny_detector.save_pretrained(tmp_path)
    with pytest.raises(ZeroDivisionError):
        publish.push(REPO, tmp_path, "card", token=TOKEN)
    assert asked[0].get("private") is None


def test_a_hub_that_cannot_be_reached(tiny_detector, tmp_path, monkeypatch):
    """The error has one line, and is one that a command prints without its traceback."""

    def fail(self, *args, **options):
        raise publish.huggingface_hub.errors.HTTPError("Name or service not known")

    for name in ("create_repo", "repo_info"):  # whichever is asked first
        monkeypatch.setattr(publish.huggingface_hub.HfApi, name, fail)
    tiny_detector.save_pretrained(tmp_path)
    for push in (
        lambda: publish.push(REPO, tmp_path, "card", token=TOKEN),
        lambda: tiny_detector.push_to_hub(REPO),
        lambda: tiny_detector.push_to_hub(REPO, private=True),
    ):
        with pytest.raises(OSError, match=rf"^{REPO}: the Hub at https?://\S+ cannot be reached \(.+\); try again$"):
            push()


def test_a_damaged_log_is_no_obstacle(tmp_path):
    """Lines that a crash cut are left out, and a run folder that is something else gives an error that names it."""
    start = dict(command=["train_coco.py"], versions={"torch": "2.15"}, machine="x86")
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
    assert publish.training_facts(tmp_path, "best")["measured"] == "not scored"
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "AP": 0.25}\n[1]\n\xff\n' + b'{"step": 2, "AP": null}\n{"AP": 0.'
    )
    assert str(publish.training_facts(tmp_path, "best")["measured"]) == "AP 0.250"
    for content in ("{", "[]", "{}", '{"starts": []}', '{"starts": [{}]}', '{"starts": [{"command": 1}]}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="run.json"):
            publish.training_facts(tmp_path, "best")


@pytest.mark.parametrize("num_classes", [0, 7])
def test_the_card_of_a_v2_backbone_imports_this_package(num_classes, tmp_path):
    """Only of a body out of a foreign checkpoint it is not known what the input was."""
    net = timm.create_model("vovnetv2_19_slim_dw", num_classes=num_classes)
    save_classifier(net, "vovnetv2_19_slim_dw", tmp_path / "net")
    card = str(publish.checked_card(tmp_path / "net"))
    assert "import vovnet_zoo" in card and ("does not tell the order" in card) == (num_classes == 0)
    assert f"image-{'classification' if num_classes else 'feature-extraction'}" in card


def test_published_backbone_loads_in_stock_timm(hub_on_loopback, tmp_path):
    """The backbone loads in a process where `vovnet_zoo` cannot be imported."""
    torch.manual_seed(0)
    net = timm.create_model("vovnet27_slim", num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.save((x, net(x).detach()), tmp_path / "expected.pt")
    publish = f"""
import sys; sys.argv = ["vovnet-zoo", "publish", "{tmp_path / "net.pth"}", "someone/slim", "--license", "mit"]
from vovnet_zoo.cli import main; main()
"""
    result = run_python(publish, HF_TOKEN=TOKEN)
    assert result.returncode == 0 and "/commit/" in result.stdout, result.stderr
    card = hub_on_loopback.repos["someone/slim"].files("main")[1][hub.CARD].decode()
    assert "license: mit" in card and 'create_model("hf-hub:someone/slim", pretrained=True)' in card
    assert "3,016,327" in card and "sha256" in card and "GFLOPs" in card
    code = f"""
import sys; sys.modules["vovnet_zoo"] = None
import timm, torch
x, expected = torch.load("{tmp_path / "expected.pt"}")
net = timm.create_model("hf-hub:someone/slim", pretrained=True).eval()
assert (net(x) - expected).abs().max() < 1e-5 * expected.abs().max()
print(timm.create_model("hf-hub:someone/slim", pretrained=True, features_only=True)(x)[-1].shape)
"""
    result = run_python(code, HF_HOME=str(tmp_path / "other"))
    assert result.returncode == 0 and "512" in result.stdout, result.stderr


def test_publish_a_training(tiny_detector, hub_on_loopback, tmp_path, monkeypatch, capsys):
    """The card has the facts of the run folder, and a damaged model is not pushed."""
    tiny_detector.save_pretrained(tmp_path / "run" / "best")
    about = dict(command=["train_coco.py", "finetune"], versions={"torch": "2.15"}, machine="x86, 2 cores")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"starts": [about]}))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(dict(step=1, AP=0.25, AP50=0.5)) + "\n")
    arguments = ["vovnet-zoo", "publish", str(tmp_path / "run" / "best"), REPO, "--private", "--token", TOKEN]
    monkeypatch.setattr("sys.argv", arguments)
    cli.main()
    assert "/commit/" in capsys.readouterr().out
    card = hub_on_loopback.repos[REPO].files("main")[1][hub.CARD].decode()
    for fact in ("AP 0.250", "train_coco.py finetune", "GMACs) at", "license: apache-2.0", "sha256", "2 cores"):
        assert fact in card
    assert str(tmp_path) not in card and same(vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN), tiny_detector)

    weights = {**tiny_detector.state_dict()}
    weights["head.scales"] = weights["head.scales"] * torch.nan
    write_safetensors(weights, tmp_path / "run" / "best" / hub.WEIGHTS)
    with pytest.raises(SystemExit):
        cli.main()
    assert "not all its outputs are finite" in capsys.readouterr().err and len(hub_on_loopback.repos[REPO].commits) == 1
