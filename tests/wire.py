"""The kubelet's APIs as protobuf and grpcio modules, made from protos/ for the peers of the tests.

`dp` and `dp_grpc` are the device plugin API, `pr` is the pod resources API.
"""

import hashlib
import importlib
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.protoc import PROTOS, generate

CACHE = PROTOS.parent / ".cache" / "wire"


def _generated() -> Path:
    key = hashlib.sha256(version("grpcio-tools").encode())
    for proto in sorted(PROTOS.rglob("*.proto")):
        key.update(str(proto.relative_to(PROTOS)).encode() + proto.read_bytes())
    made = CACHE / key.hexdigest()[:16]
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Made aside and renamed: test runs beside each other never see half of it.
        fresh = Path(tempfile.mkdtemp(dir=CACHE))
        generate("protobuf", fresh)
        try:
            fresh.rename(made)
        except OSError:  # the other run was first
            shutil.rmtree(fresh)
    return made


# The generated modules import each other by the paths of their .proto files.
sys.path.insert(0, str(_generated()))
try:
    dp = importlib.import_module("deviceplugin.v1beta1.api_pb2")
    dp_grpc = importlib.import_module("deviceplugin.v1beta1.api_pb2_grpc")
    pr = importlib.import_module("podresources.v1.api_pb2")
finally:
    sys.path.pop(0)
