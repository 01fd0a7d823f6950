"""Two nodes, as two network namespaces of this machine, over torchrun's c10d rendezvous. Needs root and `ip`."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from launch import STORE_PER_RESTART, losses, rows, train, train_command
from test_resume import wait_for_step

from vovnet_zoo import FCOS

pytestmark = pytest.mark.slow
OPTIONS = "--steps 24 --workers 0 --checkpoint-every 2 --frozen-norm --optimizer momentum --lr 0.01"
ADDRESSES = ("10.71.7.1", "10.71.7.2")


@pytest.fixture
def nodes():
    """Names of two namespaces that reach each other, and nothing else."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    names = [f"vz{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
        link = f"link add veth0 netns {names[0]} type veth peer veth0 netns {names[1]}"
        subprocess.run(["ip", *link.split()], check=True)
        for name, address in zip(names, ADDRESSES, strict=True):
            for line in (f"addr add {address}/24 dev veth0", "link set veth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *line.split()], check=True)
        yield names
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """data -> run folder of one node that nothing happened to, made when first asked for."""
    out = tmp_path_factory.mktemp("one") / "run"

    def run(data):
        if not out.exists():
            train(data, out, OPTIONS, 2)
        return out

    return run


def start(node: str, data, out, again: bool = False) -> subprocess.Popen:
    """torchrun with one process on a node; `again` starts it again until it succeeds."""
    is_host = node.endswith("a")
    # a namespace shares the machine's host name, so torchrun has to be told who is who
    rendezvous = (
        f"--nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-id vz --rdzv-endpoint {ADDRESSES[0]}:29517 "
        f"--rdzv-conf join_timeout=3600,is_host={int(is_host)} --local-addr {ADDRESSES[not is_host]}"
    )
    line = train_command(data, out, OPTIONS, 2, rendezvous)
    line[line.index("--nproc-per-node=2")] = "--nproc-per-node=1"
    if again:
        line = ["bash", "-c", 'until "$@"; do sleep 5; done', "bash", *line]
    line = ["ip", "netns", "exec", node, *line]
    env = os.environ | STORE_PER_RESTART | {"GLOO_SOCKET_IFNAME": "veth0"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def kill_all(node: str) -> None:
    """SIGKILL for torchrun and its workers, which are in sessions of their own."""
    for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def lose(node: str, job: subprocess.Popen, out) -> None:
    kill_all(node)
    job.communicate()
    assert rows(out)[-1]["step"] < 20  # in the middle of the run


def finish(job: subprocess.Popen) -> str:
    try:
        printed = job.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired as error:
        raise AssertionError("hangs: " + (error.output or b"").decode()) from None
    assert job.returncode == 0, printed
    return printed


def assert_same(out, other) -> None:
    """Bitwise: two processes add two numbers in either order."""
    assert losses(out) == losses(other)
    ours, theirs = (FCOS.from_pretrained(run / "last").state_dict() for run in (out, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_two_nodes_equal_one(tiny_coco, tmp_path, nodes, undisturbed):
    jobs = [start(node, tiny_coco, tmp_path / "run") for node in nodes]
    for job in jobs:
        finish(job)
    assert_same(tmp_path / "run", undisturbed(tiny_coco))


@pytest.mark.parametrize("unplugged", [False, True])
def test_a_lost_node_comes_back(tiny_coco, tmp_path, nodes, undisturbed, unplugged):
    """The other's torchrun waits for it, and both go on; also where nobody tells the other that it is gone."""
    out = tmp_path / "run"
    first, second = (start(node, tiny_coco, out) for node in nodes)
    wait_for_step(out, 5, first)
    if unplugged:
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "veth0", "down"], check=True)
    lose(nodes[1], second, out)
    if unplugged:
        time.sleep(20)  # torchrun gives up a silent node after 15 s
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "veth0", "up"], check=True)
    second = start(nodes[1], tiny_coco, out)
    assert "going on after step" in finish(first)
    finish(second)
    assert_same(out, undisturbed(tiny_coco))


def test_the_lost_host_comes_back(tiny_coco, tmp_path, nodes, undisturbed):
    """The node of the rendezvous takes every torchrun with it, so each is started again until it succeeds."""
    out = tmp_path / "run"
    first, second = (start(node, tiny_coco, out, again=True) for node in nodes)
    wait_for_step(out, 5, first)
    lose(nodes[0], first, out)
    first = start(nodes[0], tiny_coco, out, again=True)
    assert "going on after step" in finish(first)
    finish(second)
    assert_same(out, undisturbed(tiny_coco))
