import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.holders import Holder
from vgpu_agent.usage.containers import holders_by_id, named_by

ID = "7dea796eb5d6826a85978fa316612874aa3d576ac576495bed83d77fbc9dc744"
OTHER = "09ab" * 16


@pytest.mark.parametrize(
    ("link", "holder"),
    [
        (f"train-0_team-a_main-{ID}.log", Holder("team-a", "train-0", "main")),
        (f"a_b_c-{ID}.log", Holder("b", "a", "c")),
        # A static pod ends in the name of its node, which may have dots.
        (
            f"etcd-node1.example.org_kube-system_etcd-{ID}.log",
            Holder("kube-system", "etcd-node1.example.org", "etcd"),
        ),
        (
            f"web-7f-x2_default_nginx-side-car-{ID}.log",
            Holder("default", "web-7f-x2", "nginx-side-car"),
        ),
        # A container's name may look like an ID too.
        (f"p_n_{OTHER[:63]}-{ID}.log", Holder("n", "p", OTHER[:63])),
    ],
    ids=["plain", "short", "dots in the pod", "dashes in the container", "an ID in the container"],
)
def test_a_link_names_its_container(link, holder: Holder):
    assert named_by(link) == (ID, holder)


@pytest.mark.parametrize(
    "link",
    [
        "",
        ".log",
        "-.log",
        f"{ID}.log",
        f"pod_container-{ID}.log",
        f"a_b_c_d-{ID}.log",
        f"__-{ID}.log",
        f"pod_ns_-{ID}.log",
        f"pod_ns_c-{ID[:40]}.log",  # cut at 255 characters by the kubelet
        f"pod_ns_c-{ID.upper()}.log",
        f"pod_ns_c-{ID}.log.1",
        f"pod_ns_c-{ID}.log\n",
        f"pod_ns_c-{ID}",
        f"pod_ns_c.d-{ID}.log",
        f'pod"_ns_c-{ID}.log',
        f"pod\udcff_ns_c-{ID}.log",  # not UTF-8: no metric could carry it
    ],
)
def test_a_malformed_name_is_passed_over(link):
    assert named_by(link) is None


@given(st.text())
@tried(200)
def test_any_other_name_is_passed_over(link):
    assert named_by(link) is None


def test_links_are_read_by_their_names_wherever_they_lead(tmp_path):
    names = [f"one_ns_c-{ID}.log", f"two_ns_c-{OTHER}.log", "README", f"{ID}.log"]
    for name in names[1:]:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    (tmp_path / names[0]).write_text("")
    (tmp_path / "folder").mkdir()
    assert holders_by_id(tmp_path) == {
        ID: Holder("ns", "one", "c"),
        OTHER: Holder("ns", "two", "c"),
    }


def test_a_directory_without_links_names_nothing_and_a_missing_one_is_an_error(tmp_path):
    assert holders_by_id(tmp_path) == {}
    with pytest.raises(FileNotFoundError):
        holders_by_id(tmp_path / "missing")
