"""The other half of the stand-in: passes commands to the daemon of control.py. Quick to start."""

import _socket
import os
import sys

for line in sys.stdin:
    connection = _socket.socket(_socket.AF_UNIX)
    if connection.connect_ex(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control") != 0:
        print("Cannot find MPS control daemon process", file=sys.stderr)
        sys.exit(1)
    connection.send(line.encode())
    while said := connection.recv(1 << 16):
        print(said.decode(), end="")
