"""A CUDA process that does what it is asked for: JSON lines in, JSON lines out.

Its load is a matrix product of PyTorch or CuPy where one of them is there, else a small kernel of
its own; memory and faults always go through the driver's own library, whose words are the answer.
"""

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20

# Multiplies and adds n times in each thread, then writes the result to out[thread].
KERNEL = b"""
.version 6.0
.target sm_60
.address_size 64
.visible .entry load(.param .u64 out, .param .u32 n)
{
    .reg .pred %p<2>;
    .reg .f32 %f<2>;
    .reg .b32 %r<7>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [n];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r5, %r2, %r3, %r4;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd2, %rd3;
    mov.f32 %f1, 0f3F800000;
    mov.u32 %r6, 0;
AGAIN:
    fma.rn.f32 %f1, %f1, %f1, %f1;
    add.u32 %r6, %r6, 1;
    setp.lt.u32 %p1, %r6, %r1;
    @%p1 bra AGAIN;
    st.global.f32 [%rd4], %f1;
    ret;
}
"""
BLOCKS, THREADS, ROUNDS = 1024, 256, 20_000


class CudaError(Exception):
    """A call of the driver's library failed."""


class Cuda:
    """The first GPU that this process sees, through libcuda.so.1 and its primary context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        module, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuModuleLoadData", ctypes.byref(module), KERNEL)
        self.call("cuModuleGetFunction", ctypes.byref(self._kernel), module, b"load")
        self._out = self.allocate(4 * BLOCKS * THREADS)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()} ({code})")

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def memory(self) -> tuple[int, int]:
        """Free and total MiB, as CUDA shows them."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value // MIB, total.value // MIB

    def gpus(self) -> list[str]:
        """PCI bus IDs in the order of the ordinals."""
        count, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        self.call("cuDeviceGetCount", ctypes.byref(count))
        found = []
        for ordinal in range(count.value):
            self.call("cuDeviceGetPCIBusId", text, len(text), ordinal)
            found.append(text.value.decode().lower())
        return found

    def run(self, out: int | None = None, rounds: int = ROUNDS) -> None:
        """The kernel, waited for. An `out` that is no memory is an illegal access."""
        first = ctypes.c_uint64(self._out if out is None else out)
        values = (first, ctypes.c_uint32(rounds))
        pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", self._kernel, BLOCKS, 1, 1, THREADS, 1, 1, 0, None, pointers, 0)
        self.call("cuCtxSynchronize")


def cuda_problem() -> str | None:
    """Why no CUDA client can run here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"CUDA clients cannot run here: {error}."
    return None


def make_step(cuda: Cuda) -> tuple[str, Callable[[], object]]:
    """One request of a model server, and what it is made with."""
    if importlib.util.find_spec("torch"):
        import torch

        left = torch.rand(2048, 2048, device="cuda")
        return "torch", lambda: (left @ left).sum().item()
    if importlib.util.find_spec("cupy"):
        import cupy

        right = cupy.random.rand(2048, 2048, dtype=cupy.float32)
        return "cupy", lambda: float((right @ right).sum())
    return "kernel", cuda.run


def work(cuda: Cuda, seconds: float, start_at: float) -> dict[str, Any]:
    """Steps until the time is over; milliseconds of each."""
    library, step = make_step(cuda)
    for _ in range(3):
        step()  # what is loaded once is not measured
    time.sleep(max(0.0, start_at - time.time()))
    latencies, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds:
        before = time.perf_counter()
        step()
        latencies.append(round(1000 * (time.perf_counter() - before), 3))
    return {"library": library, "seconds": time.perf_counter() - begun, "latencies": latencies}


def fill(cuda: Cuda, step_mib: int, most_mib: int) -> dict[str, Any]:
    """Takes memory until it is refused, or so much; what was taken and the refusal."""
    taken = 0
    try:
        while taken < most_mib:
            cuda.allocate(step_mib * MIB)
            taken += step_mib
    except CudaError as error:
        return {"mib": taken, "refusal": str(error)}
    return {"mib": taken, "refusal": None}


def main() -> None:
    cuda: Cuda | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer: dict[str, Any] = {}
        try:
            cuda = cuda or Cuda()
            if do == "info":
                answer = {"memory": cuda.memory(), "gpus": cuda.gpus()}
            elif do == "fill":
                answer = fill(cuda, **request)
            elif do == "work":
                answer = work(cuda, **request)
            elif do == "illegal":
                cuda.run(out=1 << 44, rounds=1)
        except Exception as error:  # noqa: BLE001 - the answer is what went wrong
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
