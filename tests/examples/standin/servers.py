"""Stand-ins for the servers of the examples: each takes what the real one would.

    servers.py NAME ARGUMENTS

NAME is the program's. `sleep` moves the clock.
"""

import argparse
import re
import sys
from pathlib import Path

import gpu

MIB = 1 << 20


def sleep(seconds: str) -> None:
    gpu.CLOCK.write_text(str(float(gpu.CLOCK.read_text()) + float(seconds)))


def vllm(*arguments: str) -> None:
    """Takes a fraction of what CUDA shows when it starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port")
    parser.add_argument("--max-model-len")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    fraction = parser.parse_args(arguments).gpu_memory_utilization
    sleep("8")  # it opens CUDA long after its start
    assert 0 < fraction <= 1, "vLLM refuses it"
    gpu.take(fraction * gpu.total())


def tensorflow(*arguments: str) -> None:
    """Takes a fraction of what CUDA shows, or what its only virtual device may have: never both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port")
    parser.add_argument("--rest_api_port")
    parser.add_argument("--model_name")
    parser.add_argument("--model_base_path")
    parser.add_argument("--per_process_gpu_memory_fraction", type=float)
    parser.add_argument("--tensorflow_session_config_file", type=Path)
    parser.add_argument("--platform_config_file", type=Path)
    told = parser.parse_args(arguments)
    file = told.tensorflow_session_config_file or told.platform_config_file
    if file is None:
        return gpu.take((told.per_process_gpu_memory_fraction or 1) * gpu.total())
    assert told.per_process_gpu_memory_fraction is None, "TensorFlow refuses both"
    text = file.read_text()
    assert text.count("{") == text.count("}")
    (limit,) = re.findall(
        r"gpu_options \{.*experimental \{\s*virtual_devices \{ memory_limit_mb: (\d+) \}",
        text,
        re.DOTALL,
    )
    return gpu.take(int(limit) * MIB)


def triton(*arguments: str) -> None:
    """Takes its pool, and for each instance of a model as much as ONNX Runtime may."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-repository", type=Path)
    parser.add_argument("--cuda-memory-pool-byte-size", default=f"0:{64 * MIB}")
    told = parser.parse_args(arguments)
    size = int(told.cuda_memory_pool_byte_size.removeprefix("0:"))
    for config in told.model_repository.glob("*/config.pbtxt"):
        text = config.read_text()
        assert 'backend: "onnxruntime"' in text
        parameter = r'^parameters \{ key: "gpu_mem_limit" value: \{ string_value: "(\d+)" \} \}$'
        (limit,) = re.findall(parameter, text, re.MULTILINE)
        (count,) = re.findall(r"^instance_group \{ count: (\d+) ", text, re.MULTILINE)
        size += int(count) * int(limit)
    gpu.take(size)


SERVERS = {
    "sleep": sleep,
    "vllm": vllm,
    "tensorflow_model_server": tensorflow,
    "tf_serving_entrypoint.sh": tensorflow,
    "tritonserver": triton,
}

if __name__ == "__main__":
    SERVERS[sys.argv[1]](*sys.argv[2:])
