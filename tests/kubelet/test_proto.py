"""The generated code is what protos/ say, and its bytes are what protobuf itself makes of them."""

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import betterproto
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

import vgpu_agent.kubelet._proto
from tests.model.strategies import tried
from tests.protoc import generate
from tests.wire import dp, pr
from vgpu_agent.kubelet._proto import v1, v1beta1

APIS = [(dp, v1beta1), (pr, v1)]


def ours_by_name(module):
    """The agent's message classes, by lower-case name: betterproto writes NUMANode as NumaNode."""
    return {
        name.lower(): kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, betterproto.Message)
    }


# Every message of both APIs: what protobuf knows of it and the agent's class.
MESSAGES = {
    descriptor.full_name: (descriptor, ours_by_name(generated)[descriptor.name.lower()])
    for module, generated in APIS
    for descriptor in module.DESCRIPTOR.message_types_by_name.values()
}
OURS = {name: kind for name, (_, kind) in MESSAGES.items()}
every_message = pytest.mark.parametrize("name", MESSAGES)


def is_map(field):
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def our_name(kind, number):
    (name,) = (
        name for name, meta in kind._betterproto.meta_by_field_name.items() if meta.number == number
    )
    return name


def to_ours(theirs):
    """The agent's message with the fields of a protobuf message, built as the agent builds it."""
    kind = OURS[theirs.DESCRIPTOR.full_name]
    values = {}
    for field in theirs.DESCRIPTOR.fields:
        value = getattr(theirs, field.name)
        if is_map(field):
            value = dict(value)
        elif field.is_repeated:
            value = [to_ours(one) if field.message_type else one for one in value]
        elif field.has_presence:
            if not theirs.HasField(field.name):
                continue
            value = to_ours(value) if field.message_type else value
        values[our_name(kind, field.number)] = value
    return kind(**values)


def fields_of_theirs(theirs) -> dict[int, Any]:
    """The values of a protobuf message by field number; what is absent is None."""
    values = {}
    for field in theirs.DESCRIPTOR.fields:
        value = getattr(theirs, field.name)
        if is_map(field):
            value = dict(value)
        elif field.is_repeated:
            value = [fields_of_theirs(one) if field.message_type else one for one in value]
        elif field.has_presence and not theirs.HasField(field.name):
            value = None
        elif field.message_type:
            value = fields_of_theirs(value)
        values[field.number] = value
    return values


def fields_of_ours(ours) -> dict[int, Any]:
    def plain(value):
        if not isinstance(value, betterproto.Message):
            return value
        return fields_of_ours(value) if betterproto.serialized_on_wire(value) else None

    values = {}
    for name, meta in ours._betterproto.meta_by_field_name.items():
        value = getattr(ours, name)
        if isinstance(value, list):
            # An element is there, empty or not.
            value = [
                fields_of_ours(one) if isinstance(one, betterproto.Message) else one
                for one in value
            ]
        values[meta.number] = plain(value)
    return values


def has_map(descriptor):
    """Whether a message of this type may carry a map, whose entries come in no order."""
    return any(
        is_map(field) or (field.message_type is not None and has_map(field.message_type))
        for field in descriptor.fields
    )


def check_both_ways(theirs):
    kind = OURS[theirs.DESCRIPTOR.full_name]
    parsed = kind.FromString(theirs.SerializeToString())
    assert fields_of_ours(parsed) == fields_of_theirs(theirs)
    for ours in (parsed, to_ours(theirs)):
        assert type(theirs).FromString(bytes(ours)) == theirs
        assert has_map(theirs.DESCRIPTOR) or bytes(ours) == theirs.SerializeToString()
        # grpclib calls this one.
        assert ours.SerializeToString() == bytes(ours)


# The strategies

TEXT = st.text(max_size=20)
SCALARS = {
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
}


def messages(descriptor, *, full=False):
    """Any protobuf message of this type, or one with all fields. None contains itself."""
    fields = {field.name: values(field, full=full) for field in descriptor.fields}
    required = {name: value for name, (value, optional) in fields.items() if full or not optional}
    optional = {name: value for name, (value, _) in fields.items() if name not in required}
    kind = GetMessageClass(descriptor)
    return st.fixed_dictionaries(required, optional=optional).map(lambda given: kind(**given))


def values(field, *, full):
    """A strategy for the field, and whether it may be absent."""
    least = 1 if full else 0
    if is_map(field):
        # betterproto loses the one entry whose key and value are both empty: no variable has that.
        return st.dictionaries(TEXT.filter(bool), TEXT, min_size=least, max_size=3), False
    if field.message_type:
        one = messages(field.message_type, full=full)
    else:
        one = SCALARS[field.type].filter(bool) if full else SCALARS[field.type]
    if field.is_repeated:
        return st.lists(one, min_size=least, max_size=3), False
    return one, field.has_presence


# The tests


@pytest.mark.slow
def test_the_committed_code_is_what_protos_make(tmp_path, monkeypatch):
    # protoc finds its plugins there, also where the virtual environment is not activated.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    generate("betterproto", tmp_path)
    committed = Path(vgpu_agent.kubelet._proto.__file__).parent
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py")}
    assert made == {
        path.relative_to(committed): path.read_bytes() for path in committed.rglob("*.py")
    }, "run `make proto`"


@pytest.mark.parametrize(("theirs", "ours"), APIS)
def test_there_is_nothing_in_one_code_that_is_not_in_the_other(theirs, ours):
    assert {name.lower() for name in theirs.DESCRIPTOR.message_types_by_name} == set(
        ours_by_name(ours)
    )


@every_message
def test_an_empty_message_is_no_bytes_and_no_bytes_are_an_empty_message(name):
    descriptor, kind = MESSAGES[name]
    assert bytes(kind()) == b""
    check_both_ways(GetMessageClass(descriptor)())


@every_message
@pytest.mark.parametrize("full", [False, True], ids=["any", "full"])
@given(data=st.data())
@settings(tried(15), database=None)
def test_any_message_arrives_in_both_directions(name, full, data):
    descriptor, _ = MESSAGES[name]
    theirs = data.draw(messages(descriptor, full=full))
    assert not full or len(theirs.ListFields()) == len(descriptor.fields)
    check_both_ways(theirs)


def container(**given):
    return dp.AllocateResponse(container_responses=[dp.ContainerAllocateResponse(**given)])


GOLDEN = [
    (dp.TopologyInfo(nodes=[dp.NUMANode(ID=0)]), "0a00"),
    (dp.Device(ID="a", topology=dp.TopologyInfo()), "0a01611a00"),
    (dp.NUMANode(ID=-1), "08ffffffffffffffffff01"),
    (container(), "0a00"),
    (container(devices=[dp.DeviceSpec()]), "0a021a00"),
    (
        dp.RegisterRequest(options=dp.DevicePluginOptions(pre_start_required=False)),
        "2200",
    ),
    (dp.ContainerAllocateRequest(devices_ids=["", "b"]), "0a000a0162"),
    (pr.ClaimResource(device_name="d", share_id=""), "2201642a00"),
    (pr.ContainerResources(cpu_ids=[0, 1, 300]), "1a040001ac02"),
    (pr.ContainerMemory(size=2**64 - 1), "10ffffffffffffffffff01"),
]


@pytest.mark.parametrize(("theirs", "golden"), GOLDEN, ids=[golden for _, golden in GOLDEN])
def test_bytes_that_are_easily_got_wrong(theirs, golden):
    assert theirs.SerializeToString().hex() == golden
    assert bytes(to_ours(theirs)).hex() == golden
    check_both_ways(theirs)


def test_maps_arrive_also_where_keys_and_values_are_empty():
    # betterproto leaves the default out of an entry; that reads the same.
    maps = {"A": "", "": "b", "LONG": "x" * 300, "ü": "🂡"}
    theirs = container(envs=maps, annotations={"vendor/key": ""})
    check_both_ways(theirs)
    read = dp.AllocateResponse.FromString(bytes(to_ours(theirs)))
    assert dict(read.container_responses[0].envs) == maps
    assert dict(read.container_responses[0].annotations) == {"vendor/key": ""}


def test_a_message_that_is_given_nothing_is_left_out():
    """Where an empty message has to be on the wire, a field has to be named."""
    bare = v1beta1.RegisterRequest(options=v1beta1.DevicePluginOptions())
    named = v1beta1.RegisterRequest(options=v1beta1.DevicePluginOptions(pre_start_required=False))
    assert not dp.RegisterRequest.FromString(bytes(bare)).HasField("options")
    assert dp.RegisterRequest.FromString(bytes(named)).HasField("options")


def test_fields_of_other_kubelets_do_not_disturb():
    # Field 1 of DynamicResource was in use once; 900 is from the future.
    old = bytes.fromhex("0a03 6f6c64 12016e a238 0178")
    assert v1.DynamicResource.FromString(old).claim_name == "n"
    assert pr.DynamicResource.FromString(old).claim_name == "n"


@pytest.mark.parametrize(
    ("file", "theirs"),
    [
        ("podresources-list.bin", pr.ListPodResourcesResponse),
        ("podresources-allocatable.bin", pr.AllocatableResourcesResponse),
    ],
)
def test_what_a_real_kubelet_said_is_read_alike(file, theirs):
    raw = (Path(__file__).parent.parent / "data" / file).read_bytes()
    message = theirs.FromString(raw)
    assert len(message.ListFields()) > 0
    check_both_ways(message)
