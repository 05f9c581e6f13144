from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.holders import GpuProcess, Holder, Used, attribute

ONE, TWO = Holder("ns", "pod", "one"), Holder("ns", "pod", "two")


processes = st.builds(GpuProcess, st.integers(1, 9), st.none() | st.integers(0, 2**40))


@given(
    st.dictionaries(st.sampled_from(["GPU-a", "GPU-b"]), st.lists(processes)),
    st.dictionaries(st.integers(1, 9), st.sampled_from([ONE, TWO])),
)
@tried(200)
def test_processes_of_a_container_are_added_up_for_each_gpu(
    running: dict[str, list[GpuProcess]], containers: dict[int, Holder]
):
    usage = attribute(running, containers)
    assert usage.unattributed == {
        uuid: sum(each.pid not in containers for each in found) for uuid, found in running.items()
    }
    expected = {}
    for uuid, found in running.items():
        for holder in (ONE, TWO):
            of = [each for each in found if containers.get(each.pid) == holder]
            told = [each.memory_bytes for each in of if each.memory_bytes is not None]
            if of:
                expected[uuid, holder] = Used(len(of), sum(told) if told else None)
    assert usage.containers == expected
