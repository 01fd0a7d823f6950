"""Two nodes, as two network namespaces of this machine, over torchrun's c10d rendezvous. Needs root and `ip`."""

import os
import shutil
import signal
import subprocess

import pytest
import torch
from launch import losses, train, train_command

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
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(node: str, data, out) -> subprocess.Popen:
    """torchrun with one process on a node."""
    is_host = node.endswith("a")
    # a namespace shares the machine's host name, so torchrun has to be told who is who
    rendezvous = (
        f"--nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-id vz --rdzv-endpoint {ADDRESSES[0]}:29517 "
        f"--rdzv-conf is_host={int(is_host)} --local-addr {ADDRESSES[not is_host]}"
    )
    line = train_command(data, out, OPTIONS, 2, rendezvous)
    line[line.index("--nproc-per-node=2")] = "--nproc-per-node=1"
    line = ["ip", "netns", "exec", node, "env", "GLOO_SOCKET_IFNAME=veth0", *line]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(job: subprocess.Popen) -> str:
    try:
        printed = job.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError("hangs: " + job.communicate()[0]) from None
    assert job.returncode == 0, printed
    return printed


def assert_same(out, other) -> None:
    """Bitwise: two processes add two numbers in either order."""
    assert losses(out) == losses(other)
    ours, theirs = (FCOS.from_pretrained(run / "last").state_dict() for run in (out, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_two_nodes_equal_one(tiny_coco, tmp_path, nodes):
    jobs = [start(node, tiny_coco, tmp_path / "run") for node in nodes]
    for job in jobs:
        finish(job)
    train(tiny_coco, tmp_path / "one", OPTIONS, 2)
    assert_same(tmp_path / "run", tmp_path / "one")
