"""The source of GPUs, from the settings."""

from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.settings import GpuDriverKind, Settings


def make_driver(settings: Settings) -> GpuDriver:
    """The source of GPUs that the settings name."""
    # Each is imported where it is used: simulated GPUs need no NVML, nor its memory.
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus

        return SimulatedDriver(
            simulated_gpus(
                settings.simulated_gpus,
                settings.simulated_model,
                settings.simulated_memory,
                settings.simulated_numa_nodes,
            )
        )
    from vgpu_agent.gpu.nvml import NvmlDriver

    return NvmlDriver()
