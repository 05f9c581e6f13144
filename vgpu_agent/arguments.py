"""The command line: what is run on a node, and `dev`, which is run on a desk."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

from vgpu_agent import __version__
from vgpu_agent.address import Address, parse_address
from vgpu_agent.gpu.simulated import SimulatedFault

_GPU = "its index, UUID, the beginning of its UUID, or PCI bus ID"

_FAULTS = {
    SimulatedFault.XID: "it reports this XID; with 79 it falls off the bus too",
    SimulatedFault.LOSE: "it falls off the bus",
    SimulatedFault.ECC: "it has an uncorrectable memory error",
    SimulatedFault.HANG: "it no longer answers",
    SimulatedFault.HEAL: "it is reset, and well; without --gpu all that have a fault",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="vgpu-agent",
        description="Shares each NVIDIA GPU of a Kubernetes node as many virtual GPUs.",
        epilog="Exit codes: 0 done; 1 failed or refused; 2 wrong arguments or settings.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run the agent; settings are VGPU_* variables")
    status = commands.add_parser(
        "status", help="show the GPUs, their vGPUs and who holds them, as the running agent says"
    )
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="what the agent says, as JSON")
    form.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=_seconds,
        metavar="SECONDS",
        help="show it again every 2 seconds, or at that interval, until Ctrl-C",
    )
    status.add_argument(
        "--wide",
        action="store_true",
        help="with UUID, PCI address and NUMA node of each GPU, and nothing cut",
    )
    status.add_argument(
        "--address",
        type=_address,
        metavar="HOST:PORT",
        help="ask an agent over HTTP instead of the one whose VGPU_STATE_DIRECTORY this is",
    )
    release = commands.add_parser(
        "release", help="make the running agent close NVML, so that GPUs can be reset"
    )
    release.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        metavar="TIME",
        help="for how long, such as 90 or 10m (60)",
    )
    release.add_argument(
        "--reset-done",
        nargs="?",
        const="",
        metavar="GPU",
        help="end a release: this GPU, or every one that waits for it, was reset, and is probed;"
        " with --for release again then, for the next GPU",
    )
    cordon = commands.add_parser(
        "cordon", help="give no vGPU of a GPU to a pod, until `uncordon`, also after a reboot"
    )
    cordon.add_argument("gpu", metavar="GPU", help=_GPU)
    cordon.add_argument("--reason", default="", metavar="TEXT", help="is shown with it")
    uncordon = commands.add_parser("uncordon", help="take a cordon back")
    uncordon.add_argument("gpu", metavar="GPU", help=_GPU)
    drain = commands.add_parser(
        "drain-list", help="print a kubectl command for each pod that holds a vGPU of a GPU"
    )
    drain.add_argument("gpu", metavar="GPU", help=_GPU)
    simulate = commands.add_parser(
        "simulate", help="make a simulated GPU fail, to rehearse what follows"
    )
    faults = simulate.add_subparsers(dest="fault", required=True)
    for name, text in _FAULTS.items():
        # As text: where there is no such fault, all of them are named.
        fault = faults.add_parser(name.value, help=text)
        if name is SimulatedFault.XID:
            fault.add_argument("xid", type=_number, metavar="XID", help="number of the XID")
        fault.add_argument(
            "--gpu", required=name is not SimulatedFault.HEAL, metavar="GPU", help=_GPU
        )
    limits = commands.add_parser("limits", help="memory limits that the driver enforces")
    limits.add_subparsers(dest="step", required=True).add_parser(
        "enforce", help="set them for the containers that hold vGPUs, beside the agent in its pod"
    )
    mps = commands.add_parser("mps", help="set up and watch MPS, in the MPS pod of a node")
    steps = mps.add_subparsers(dest="step", required=True)
    steps.add_parser("prepare", help="make the node ready for MPS daemons")
    steps.add_parser("daemon", help="run the MPS daemons, in the foreground")
    steps.add_parser("watch", help="set the limits of the daemons and watch them")
    restart = steps.add_parser(
        "restart", help="end the MPS daemon of one GPU in order; it is started again"
    )
    restart.add_argument(
        "gpu", metavar="GPU", help=f"{_GPU}; or the name of the daemon's directory"
    )
    steps.add_parser(
        "compute-modes", help="give shared GPUs their compute mode again, such as after a reset"
    )
    restore = steps.add_parser(
        "restore", help="leave the node as it was before MPS: compute modes, directories"
    )
    restore.add_argument(
        "--at-end", action="store_true", help="after SIGTERM, when the daemons have ended"
    )
    doctor = commands.add_parser(
        "doctor",
        help="check all that the agent needs; exit code 1 if something would stop it",
    )
    doctor.add_argument("--json", action="store_true", help="the report as JSON")
    dev = commands.add_parser(
        "dev", help="run the agent with simulated GPUs and a stand-in kubelet, and watch it work"
    )
    dev.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        metavar="SECONDS",
        help="end after so many seconds; exit code 0 only if all of it worked",
    )
    return parser.parse_args(arguments)


def _number(text: str) -> int:
    with suppress(ValueError):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of an XID, such as 79")


_UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(text: str) -> float:
    unit = _UNITS.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0, nor a time such as 10m"
        )
    return seconds


def _address(text: str) -> Address:
    with suppress(ValueError):
        if (address := parse_address(text)).port:
            return address
    raise argparse.ArgumentTypeError(f"{text!r} is not host:port or [IPv6]:port")
