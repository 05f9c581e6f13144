"""What only a real GPU shows: `python -m tests.on_gpu FOLDER`, never collected by pytest.

It leaves the GPU's settings alone, starts an MPS daemon of its own in a private directory, and
starts CUDA clients with exactly the environment and mounts that the agent's Allocate returned. The
folder gets `report.md` and `transcript.json`. docs/measurements.md says what is measured and why.
"""
