"""Runs protoc on protos/: `python -m tests.protoc betterproto|protobuf DIRECTORY`.

betterproto is what the agent uses; protobuf and grpc are what its peers in the tests use.
"""

import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parent.parent / "protos"
PLUGIN = Path(sys.executable).with_name("protoc-gen-python_betterproto")


def generate(kind: str, directory: Path) -> None:
    """Writes the generated modules of every file in protos/ below `directory`."""
    out = (
        [
            # By path: the environment of this interpreter need not be activated.
            f"--plugin=protoc-gen-python_betterproto={PLUGIN}",
            f"--python_betterproto_out={directory}",
            "--python_betterproto_opt=typing.310",
        ]
        if kind == "betterproto"
        else [f"--python_out={directory}", f"--grpc_python_out={directory}"]
    )
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *out, *files], check=True
    )


if __name__ == "__main__":
    generate(sys.argv[1], Path(sys.argv[2]))
