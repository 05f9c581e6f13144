"""A CUDA process that does what it is asked for: JSON lines in, JSON lines out.

One file that needs the standard library only, so that it runs wherever Python does. It asks the
driver's own library, whose words are the answer; `request` is PyTorch's where PyTorch is there.

    client.py UID    as that user, without rights, from before CUDA starts
"""

import array
import ctypes
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
THREADS = 256
DIFFERENT = 1024
"""Bodies of different places; the others are where these are."""

STEP = 0.001
SOFTENING = 0.01
MULTIPROCESSORS, MPS_ENABLED = 16, 133  # CUdevice_attribute of cuda.h
PR_SET_DUMPABLE = 4


class CudaError(Exception):
    """A call of the driver's library failed."""


class Cuda:
    """The first GPU that this process sees, through libcuda.so.1 and its primary context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._device = ctypes.c_int()

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()} ({code})")

    def open(self) -> None:
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(self._device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxSetCurrent", context)

    def attribute(self, number: int) -> int | str:
        value = ctypes.c_int()
        try:
            self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        except CudaError as error:  # an older driver does not know every attribute
            return str(error)
        return value.value

    def memory(self) -> dict[str, int]:
        """MiB, by the call that says so."""
        free, total, whole = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        self.call("cuDeviceTotalMem_v2", ctypes.byref(whole), self._device)
        values = {"free": free, "total": total, "cuDeviceTotalMem": whole}
        return {name: value.value // MIB for name, value in values.items()}

    def allocate(self, size: int) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def allocated(self, size: int, byte: int) -> ctypes.c_uint64:
        """Memory that is written to."""
        pointer = self.allocate(size)
        self.call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(byte), ctypes.c_size_t(size))
        return pointer

    def wait(self) -> None:
        self.call("cuCtxSynchronize")

    def function(self, cubin: str, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoad", ctypes.byref(module), cubin.encode())
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function: ctypes.c_void_p, blocks: int, shared: int, *values: Any) -> None:
        pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        self.call(
            "cuLaunchKernel", function, blocks, 1, 1, THREADS, 1, 1, shared, None, pointers, None
        )


class Bodies:
    """So many bodies, a multiple of DIFFERENT, that attract each other; see kernels.cu."""

    def __init__(self, cuda: Cuda, cubin: str, count: int) -> None:
        import random  # not needed by most clients, and slow to load

        self._cuda, self._count = cuda, count
        self._function = cuda.function(cubin, "step")
        chance = random.Random(1)
        self._start = array.array("f", (chance.random() for _ in range(4 * DIFFERENT)))
        self._start[3::4] = array.array("f", [1 / count]) * DIFFERENT  # the masses
        data = self._start.tobytes() * (count // DIFFERENT)
        self._from, self._to, self._velocity = (cuda.allocated(len(data), 0) for _ in range(3))
        cuda.call("cuMemcpyHtoD_v2", self._from, data, ctypes.c_size_t(len(data)))
        self.operations = 20 * count * count  # for each pair, as is usual
        self.launch()
        cuda.wait()

    def launch(self) -> None:
        count, step = ctypes.c_int(self._count), ctypes.c_float(STEP)
        blocks, shared = self._count // THREADS, 16 * THREADS
        values = (self._from, self._to, self._velocity, count, step)
        self._cuda.launch(self._function, blocks, shared, *values)
        self._from, self._to = self._to, self._from

    def __call__(self) -> None:
        self.launch()
        self._cuda.wait()

    def error(self) -> float:
        """How far the first step of two bodies is from Python's own, as a part of it."""
        found = (ctypes.c_float * 8)()
        self._cuda.call("cuMemcpyDtoH_v2", found, self._velocity, ctypes.c_size_t(32))
        x, y, z, masses = (self._start[n::4] for n in range(4))
        worst = 0.0
        for n in range(2):
            wanted = [0.0, 0.0, 0.0]
            for there in zip(x, y, z, masses, strict=True):
                away = (there[0] - x[n], there[1] - y[n], there[2] - z[n])
                pull = there[3] / (sum(d * d for d in away) + SOFTENING) ** 1.5
                for axis in range(3):
                    wanted[axis] += away[axis] * pull * STEP * (self._count // DIFFERENT)
            distance = math.dist(wanted, found[4 * n : 4 * n + 3])
            worst = max(worst, distance / math.hypot(*wanted))
        return worst


def make_request() -> Callable[[], object]:
    """A small request of a model server: eight layers for one input, and the result here."""
    import torch

    layers = [torch.rand(1024, 1024, device="cuda") / 512 for _ in range(8)]
    first = torch.rand(1, 1024, device="cuda")

    def request() -> float:
        values = first
        for layer in layers:
            values = torch.relu(values @ layer)
        return float(values.sum())

    return request


class Client:
    """Every method is something that can be asked for."""

    def __init__(self) -> None:
        self._cuda = Cuda()
        self._work: Callable[[], object] | None = None
        self._taken: list[ctypes.c_uint64] = []

    def hello(self) -> dict[str, Any]:
        """It runs, and has done nothing yet."""
        return {}

    def open(self) -> dict[str, Any]:
        before = time.monotonic()
        self._cuda.open()
        return {
            "seconds": round(time.monotonic() - before, 3),
            "mps": self._cuda.attribute(MPS_ENABLED),
            "sms": self._cuda.attribute(MULTIPROCESSORS),
            **self._cuda.memory(),
        }

    def memory(self) -> dict[str, Any]:
        """What `open` said of it, as it is now."""
        return self._cuda.memory()

    def seen(self) -> dict[str, Any]:
        """Memory as PyTorch shows it, in MiB."""
        if importlib.util.find_spec("torch") is None:
            return {"torch": "PyTorch is not installed"}
        import torch

        free, total = torch.cuda.mem_get_info(0)
        whole = torch.cuda.get_device_properties(0).total_memory
        return {"torch": {"free": free // MIB, "total": total // MIB, "device": whole // MIB}}

    def fill(self, most: int) -> dict[str, Any]:
        """Takes memory until it is refused, or so many MiB; what was taken and the refusal."""
        taken, refusal = 0, None
        for size in (256, 16, 1):
            try:
                while taken + size <= most:
                    self._taken.append(self._cuda.allocate(size * MIB))
                    taken += size
            except CudaError as error:
                refusal = str(error)
        return {"mib": taken, "refusal": refusal}

    def release(self) -> dict[str, Any]:
        while self._taken:
            self._cuda.call("cuMemFree_v2", self._taken.pop())
        return {}

    def touch(self) -> dict[str, Any]:
        """The lightest work there is."""
        pointer = self._cuda.allocated(MIB, 1)
        self._cuda.wait()
        self._cuda.call("cuMemFree_v2", pointer)
        return {}

    def prepare(
        self, kind: str, cubin: str, bodies: int, warm: float, check: bool
    ) -> dict[str, Any]:
        """Everything that is done once, and warmed up: the next `work` begins at once."""
        answer: dict[str, Any] = {}
        if kind == "request" and importlib.util.find_spec("torch"):
            self._work, answer["with"] = make_request(), "PyTorch"
        else:
            self._work = work = Bodies(self._cuda, cubin, bodies)
            answer |= {"with": f"{bodies} bodies", "operations": work.operations}
            if check:
                answer["error"] = work.error()
        until, rounds = time.monotonic() + warm, 0
        while time.monotonic() < until or rounds < 3:
            self._work()
            rounds += 1
        return answer

    def work(self, at: float, seconds: float) -> dict[str, Any]:
        """Repeats it from then on, on the monotonic clock, for so long; milliseconds of each."""
        assert self._work is not None
        time.sleep(max(0.0, at - time.monotonic()))
        begun, times = time.monotonic(), []
        while (before := time.monotonic()) < begun + seconds:
            self._work()
            times.append(1000 * (time.monotonic() - before))
        found = {"late": begun - at, "seconds": time.monotonic() - begun, "count": len(times)}
        if times:
            times.sort()
            found["percentiles"] = [round(times[len(times) * n // 100], 4) for n in range(100)]
        return found

    def pile(self, count: int) -> dict[str, Any]:
        """Starts so many steps and waits for none."""
        assert isinstance(self._work, Bodies)
        for _ in range(count):
            self._work.launch()
        return {}

    def poke(self, cubin: str) -> dict[str, Any]:
        """An illegal access."""
        self._cuda.launch(self._cuda.function(cubin, "poke"), 1, 0)
        self._cuda.wait()
        return {}


def become(uid: int) -> None:
    """Another user, who may look at what is its own in /proc: CUDA does."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def main() -> None:
    client = Client()
    if (uid := int(sys.argv[1])) != 0:
        become(uid)
    for line in sys.stdin:
        request = json.loads(line)
        number = request.pop("number")
        try:
            answer = getattr(client, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - the answer is what went wrong
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps({"number": number, **answer}), flush=True)


if __name__ == "__main__":
    main()
