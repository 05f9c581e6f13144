"""What only a real GPU shows, in three commands of at most nine minutes each. No tests for pytest.

    python -m tests.on_gpu wheels FOLDER VENV    checks the wheels that were carried along
    python -m tests.on_gpu reach OUT             what clients of MPS reach, see and are refused
    python -m tests.on_gpu load OUT              throughput, latency, faults and kills
    python -m tests.on_gpu limits OUT            memory limits that the driver enforces

The settings of the GPU are left alone. docs/measurements.md says what is measured and why;
`tests/test_on_gpu.py` runs all of it with stand-ins, without a GPU.
"""
