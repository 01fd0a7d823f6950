"""Commands report an error of their user in one line; `--debug` adds the traceback."""

import ast
import builtins
import dataclasses
import importlib
import json
import ntpath
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from hub_server import PATIENCE
from launch import ROOT, command, run_python, tiny_config

import benchmark
import benchmark_data
import eval_coco
import memory
import profile_blocks
import runtime
import train_coco
import train_imagenet
import vovnet_zoo.cli
from vovnet_zoo import commands
from vovnet_zoo.kernels import library

RECIPES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "recipes").glob("*.py")}
MODULES = [benchmark, benchmark_data, eval_coco, profile_blocks, train_coco]


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run a recipe's command line in this process, in an empty folder; returns its exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"recipes/{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            runtime.run_command(module.main, commands.parse_command(module.PARSE))
        except SystemExit as exit:
            status = exit.code
        return status, capfd.readouterr().err

    return run


def test_every_recipe_reports_in_one_way():
    """No script parses without `parse_command`, or calls its `main` without `run_command`."""
    scripts = 0
    for name, tree in RECIPES.items():
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                scripts += 1
                line = ast.unparse(node.body[0])
                assert line in ("CONFIG = parse_command(PARSE)", "run_command(main, CONFIG)"), name
    assert scripts >= 2 * len(MODULES)


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (train_coco, "finetune --data nosuch --out out", "nosuch: no such folder"),
        (train_coco, "finetune --data x --out afile/run", "--out afile/run cannot be written (afile is a file)"),
        (train_coco, "finetune --data x --out afile", "--out afile cannot be written (afile is a file)"),
        (train_coco, "finetune --data x --out out --device tpu", "--device tpu: torch cannot use it here"),
        (train_coco, "finetune --data x --out out --device meta", "--device meta: torch cannot use it here"),
        (train_coco, "finetune --data x --out out --init ./nosuch", "'./nosuch' is no folder here"),
        (eval_coco, "--model ./no/such --data x", ". is there, no in it is not"),
        (eval_coco, "--model afile --data x", "no 'organisation/name'|is a file"),
        (eval_coco, "--model runs/x --data x", "runs/x has no config.json: there is one in runs/x/best"),
        (eval_coco, "--model runs/x --data x --out afile/x.json", "--out afile/x.json cannot be written"),
        (eval_coco, "--model runs/x --data x --out runs", "--out runs is a folder"),
        (benchmark, "--out afile/x", "--out afile/x cannot be written"),
        (benchmark, "--device tpu", "--device tpu"),
        (benchmark_data, "--data nosuch", "nosuch: no such folder"),
        (benchmark_data, "--data nosuch --out afile/x", "--out afile/x cannot be written"),
        (profile_blocks, "--out afile/x", "--out afile/x cannot be written"),
    ],
)
def test_an_error_of_the_user_is_one_line(run, tmp_path, module, arguments, message):
    (tmp_path / "afile").touch()
    (tmp_path / "runs" / "x" / "best").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "runs" / "x" / "best" / name).touch()
    status, printed = run(module, *arguments.split())
    lines = [line for line in printed.splitlines() if line.startswith(f"{module.__name__}: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in printed
    assert any(part in lines[0] for part in message.split("|"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [train_coco, eval_coco])
def test_a_gpu_that_is_not_there(run, module):
    preset = ["finetune", "--out", "out"] if module is train_coco else ["--model", "x"]
    status, printed = run(module, *preset, "--data", "x", "--device", "cuda")
    assert status == 2 and "--device cuda: torch cannot use it here" in printed and "there is: cpu" in printed
    assert "Traceback" not in printed


def test_debug_shows_where(run):
    status, printed = run(eval_coco, "--model", "./nosuch", "--data", "x", "--debug")
    assert status == 2 and "Traceback" in printed and printed.splitlines()[-1].startswith("eval_coco: './nosuch'")


def test_ctrl_c_is_one_line(run, monkeypatch):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_coco, "main", main)
    status, printed = run(eval_coco, "--model", "x", "--data", "x")
    assert (status, printed) == (128 + signal.SIGINT, "eval_coco: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")
def test_an_interrupt_while_torch_is_imported():
    """The script sends it to itself, after its arguments and before it imports torch."""
    code = (
        "import os, signal, sys; sys.argv = ['recipes/x.py']; from vovnet_zoo.commands import parse_command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a terminal
        "parse_command(lambda args: args); os.kill(os.getpid(), signal.SIGINT); import torch; print('imported')"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "x: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="Windows reports a pipe without a reader in another way")
def test_a_reader_that_leaves():
    """`vovnet-zoo list | head -1` ends without an error."""
    line = [sys.executable, "-m", "vovnet_zoo.cli", "list", "--json"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(os.name != "posix", reason="Windows reports a pipe without a reader in another way")
def test_a_reader_that_leaves_a_help_page():
    with subprocess.Popen(
        [sys.executable, "recipes/train_coco.py", "finetune", "--help"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_streams_that_are_closed(monkeypatch, closed):
    """Python has None for them then."""
    monkeypatch.setattr(sys, closed, None)
    monkeypatch.setattr(sys, "argv", ["vovnet-zoo", "--help"])
    with pytest.raises(SystemExit) as ended:
        vovnet_zoo.cli.main()
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            "finetun --data x",
            "'finetun' is no preset (did you mean 'finetune'?); give one of quickstart, finetune, ",
        ),
        ("nonsense", "'nonsense' is no preset; give one of quickstart, finetune, coco"),
        ("--data x finetune", "--data: the preset comes first, one of quickstart, "),
        ("finetune v39_1x", "finetune v39_1x: give one preset"),
        ("finetune bccd", "finetune bccd: after the preset come options, such as --data bccd"),
        ("--tyro-print-completion tcsh", "--tyro-print-completion tcsh: give one of the shells bash, zsh, fish"),
        ("--tyro-write-completion", "--tyro-write-completion: give one of the shells bash, zsh, fish"),
    ],
)
def test_what_comes_first(run, arguments, line):
    status, printed = run(train_coco, *arguments.split())
    assert status == 2 and printed.startswith(f"train_coco: {line}") and printed.count("\n") == 1


def test_letters_that_stdout_has_not():
    """On Windows, a file or pipe has cp1252."""
    code = "from vovnet_zoo.commands import run_reporting; run_reporting('x', lambda: print('猫'))"
    result = run_python(code, PYTHONIOENCODING="cp1252:strict")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\u732b")


def test_the_home_folder(run, monkeypatch):
    """A shell leaves ~ as it is in quotes, and after `=`; a folder of that name would be made."""
    monkeypatch.setenv("HOME", "/nowhere/home")
    typed = ["~", "~/a b", "--out=~/x", "--data", "~/y", "a~", "./~/a", "~other", "--split=~z", "-1"]
    home = "/nowhere/home"
    assert commands.expand_home(typed) == [
        home, f"{home}/a b", f"--out={home}/x", "--data", f"{home}/y", "a~", "./~/a", "~other", "--split=~z", "-1"
    ]  # fmt: skip
    status, printed = run(train_coco, "finetune", "--data=~/data", "--out", "~/run", "--device", "cpu")
    assert status == 2 and home in printed and not os.path.exists("~")
    monkeypatch.setattr(os.path, "expanduser", ntpath.expanduser)
    monkeypatch.setenv("USERPROFILE", r"C:\Users\me")
    assert commands.expand_home([r"~\x", r"--out=~\y"]) == [r"C:\Users\me\x", r"--out=C:\Users\me\y"]


@pytest.mark.parametrize(
    "text, advice",
    [
        (
            "InvalidCxxCompiler: No working C++ compiler found",
            "no C++ compiler; install one (apt install g++), name it in CXX",
        ),
        ("Failed to find C compiler.", "no C compiler; install one (apt install gcc), name it in CC"),
    ],
)
def test_a_missing_compiler_is_one_line(run, monkeypatch, text, advice):
    def main(config):
        raise RuntimeError(f"a report of many lines\n{text}\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(eval_coco, "main", main)
    status, printed = run(eval_coco, "--model", "x", "--data", "x")
    assert status == 2 and printed.count("\n") == 1 and advice.replace(", name", ", or name") in printed
    assert "--compile" not in printed
    status, printed = run(eval_coco, "--model", "x", "--data", "x", "--compile")
    assert status == 2 and printed.count("\n") == 1 and f"{advice}, or omit --compile" in printed


@pytest.mark.parametrize(
    "module, arguments, without",
    [
        (train_coco, "finetune --data nosuch --out out --compile", ", or omit --compile"),
        (train_imagenet, "small --data nosuch --out out --compile", ", or omit --compile"),
        (eval_coco, "--model nosuch --data nosuch --out out/x.json --compile", ", or omit --compile"),
        (benchmark, "--out out", ", or name it in CXX"),
        (profile_blocks, "--out out/x.json", ", or name it in CXX"),
    ],
)
def test_a_compiler_is_looked_for_before_anything_is_read_or_written(
    run, monkeypatch, tmp_path, module, arguments, without
):
    """The line says how to do without one, in options that the command has."""
    monkeypatch.setenv("CXX", "/nowhere/g++ -v")
    status, printed = run(module, *arguments.split(), "--device", "cpu")
    assert status == 2 and f"{module.__name__}: torch.compile finds no C++ compiler" in printed
    assert printed.endswith(f"{without}\n") and not (tmp_path / "out").exists()


def test_a_compiler_is_looked_for_in_python(monkeypatch, tiny_detector):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler; .*, name it in CXX, or leave compile=True out$"):
        vovnet_zoo.predict(tiny_detector, image, compile=True)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler; .*, or name it in CXX$"):
        vovnet_zoo.compile_detector(tiny_detector, (64, 64))
    vovnet_zoo.compile_detector(tiny_detector, (64, 64), backend="eager")


def test_where_a_compiler_is_looked_for(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda name: name if name in ("g++", "gcc", "ccache") else None)
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    assert commands.has_compiler("cuda") and commands.has_compiler() == (sys.platform == "linux")
    for named, there in (("ccache g++", True), ("clang++-99", False)):
        monkeypatch.setenv("CXX", named)
        assert commands.has_compiler() == there
    commands.check_compiler("mps")  # of another device nothing is known
    monkeypatch.setenv("CC", "icc")
    with pytest.raises(commands.CommandError, match="no C compiler; .*name it in CC"):
        commands.check_compiler("cuda")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/x.py"])
    with pytest.raises(ZeroDivisionError):
        runtime.run_command(lambda config: 1 / config, 0)


def test_a_name_offline_is_answered_at_once(run, monkeypatch, hub_on_loopback):
    """It may be a folder or a repository, so both are named; the client's own retries would take 23 s."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub_on_loopback.down = True
    status, printed = run(eval_coco, "--model", "runs/nosuch", "--data", "x")
    assert status == 2 and "runs/nosuch: there is no such folder here; as a name on the Hub" in printed
    assert sum(waited) < PATIENCE
    hub_on_loopback.down = False
    status, printed = run(eval_coco, "--model", "runs/nosuch", "--data", "x")
    assert status == 2 and "runs/nosuch is no folder here either" in printed
    asked = len(hub_on_loopback.log)
    for path in ("./runs/nosuch", "runs/no/such", "/nosuch", "../nosuch", "~/nosuch", "no such"):
        status, printed = run(eval_coco, "--model", path, "--data", "x")
        assert status == 2 and "is no folder here" in printed and len(hub_on_loopback.log) == asked


def test_a_run_that_cannot_go_on(run, monkeypatch):
    def main(config):
        raise commands.CommandError("3 steps in a row were not finite; lower --lr")

    monkeypatch.setattr(eval_coco, "main", main)
    status, printed = run(eval_coco, "--model", "x", "--data", "x")
    assert status == 2 and printed == "eval_coco: 3 steps in a row were not finite; lower --lr\n"


def test_an_error_in_a_data_loading_worker():
    text = """Caught ImageError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1
vovnet_zoo.data.images.ImageError: a.png: cannot decode the image
"""
    assert commands.describe(ValueError(text)) == "a.png: cannot decode the image"
    assert commands.describe(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert commands.describe(ValueError()) == "ValueError"


def test_under_torchrun_the_line_is_printed_once(tmp_path):
    line = command("eval_coco.py", ["--model", "./nosuch", "--data", "x", "--device", "cpu"], processes=2)
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert result.returncode != 0
    assert result.stderr.count("eval_coco: './nosuch' is no folder here") == 1
    assert 'eval_coco.py", line' not in result.stderr  # no traceback of the recipe


def test_the_classes_of_a_run_cannot_change(tiny_coco, tmp_path):
    """With --allow-changes too; torch's own error would be one of shapes."""
    config = dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), steps=1, eval_every=None)
    train_coco.main(config)
    for file in (tiny_coco / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"].append({"id": 99, "name": "blue"})
        file.write_text(json.dumps(content))
    config = dataclasses.replace(config, steps=2, allow_changes=True)
    with pytest.raises(ValueError, match=r"of 2 classes \(\['red', 'green'\]\).* has 3 .*--init .*last"):
        train_coco.main(config)


# ---- other systems --------------------------------------------------------------------------------------------------


def test_windows_has_no_resource_and_no_sigchld(monkeypatch):
    """A stand-in for Windows: these two are not there, and a run goes on without."""
    real = builtins.__import__

    def no_resource(name, *arguments, **options):
        if name == "resource":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_resource)
    monkeypatch.delitem(sys.modules, "resource", raising=False)
    try:
        assert importlib.reload(memory).peak_memory(torch.device("cpu")) is None
    finally:
        monkeypatch.undo()
        importlib.reload(memory)
    assert 0.05 < memory.peak_memory(torch.device("cpu")) < 1000
    monkeypatch.delattr(signal, "SIGCHLD")
    with runtime.StopSignal() as stop:
        assert not stop.received


@pytest.mark.parametrize(
    "platform, advice, line",
    [
        ("linux", r"install one \(apt install g\+\+\)", r"--init 'my runs\a'"),
        ("darwin", r"install one \(xcode-select --install\)", r"--init 'my runs\a'"),
        ("win32", "install Visual Studio's Build Tools", r'--init "my runs\a"'),
    ],
)
def test_what_to_type_on_each_system(monkeypatch, platform, advice, line):
    monkeypatch.setattr(commands, "sys", types.SimpleNamespace(platform=platform))
    assert re.search(advice, commands.no_compiler("cpu", ""))
    assert commands.command_line(["--init", r"my runs\a"]) == line


def test_the_kernels_are_not_built_on_windows(monkeypatch):
    """Its compilers take other options; a g++ that happens to be there makes nothing that torch can load."""
    monkeypatch.setattr(library, "sys", types.SimpleNamespace(platform="win32"))
    assert library.load.__wrapped__() == "they are not built on Windows"


def test_several_processes_need_nccl_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    runtime.check_backend(torch.device("cuda"), 1)
    runtime.check_backend(torch.device("cpu"), 2)
    for name, message in (("cuda", "NCCL"), ("mps", "CPU or NVIDIA GPUs")):
        with pytest.raises(ValueError, match=f"{message}.* without torchrun"):
            runtime.check_backend(torch.device(name), 2)


def test_macos_counts_memory_in_bytes(monkeypatch):
    here = memory.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.peak_memory(torch.device("cpu")) < here / 500
