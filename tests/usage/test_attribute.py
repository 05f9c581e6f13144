from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.holders import GpuProcess, Holder, Usage, Used, attribute

ONE, TWO = Holder("ns", "pod", "one"), Holder("ns", "pod", "two")


def test_processes_of_a_container_are_added_up_for_each_gpu():
    usage = attribute(
        {
            "GPU-a": [GpuProcess(1, 10), GpuProcess(2, 5), GpuProcess(3, 7), GpuProcess(4, 100)],
            "GPU-b": [GpuProcess(1, 3)],
            "GPU-c": [],
        },
        {1: ONE, 2: ONE, 3: TWO, 99: TWO},
    )
    assert usage.containers == {
        ("GPU-a", ONE): Used(2, 15),
        ("GPU-a", TWO): Used(1, 7),
        ("GPU-b", ONE): Used(1, 3),
    }
    assert usage.unattributed == {"GPU-a": 1, "GPU-b": 0, "GPU-c": 0}


def test_memory_that_is_not_known_adds_nothing():
    usage = attribute({"GPU-a": [GpuProcess(1, None), GpuProcess(2, 5)]}, {1: ONE, 2: ONE})
    assert usage.containers == {("GPU-a", ONE): Used(2, 5)}
    unknown = attribute({"GPU-a": [GpuProcess(1, None)]}, {1: ONE})
    assert unknown.containers == {("GPU-a", ONE): Used(1, None)}


def test_of_no_gpu_there_is_no_usage():
    assert attribute({}, {1: ONE}) == Usage()


processes = st.builds(GpuProcess, st.integers(1, 9), st.none() | st.integers(0, 2**40))


@given(
    st.dictionaries(st.sampled_from(["GPU-a", "GPU-b"]), st.lists(processes)),
    st.dictionaries(st.integers(1, 9), st.sampled_from([ONE, TWO])),
)
@tried(200)
def test_every_process_is_counted_once(
    running: dict[str, list[GpuProcess]], containers: dict[int, Holder]
):
    usage = attribute(running, containers)
    assert usage.unattributed.keys() == running.keys()
    for uuid, found in running.items():
        used = [each for (gpu, _), each in usage.containers.items() if gpu == uuid]
        assert sum(each.processes for each in used) + usage.unattributed[uuid] == len(found)
        memory = sum(each.memory_bytes or 0 for each in used)
        assert memory == sum(p.memory_bytes or 0 for p in found if p.pid in containers)
