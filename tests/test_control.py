import json
import os
import resource
import socket
import stat
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from vgpu_agent import control
from vgpu_agent.control import SOCKET, call, serve
from vgpu_agent.errors import ControlError, NoAgentError


async def echo(request: Mapping[str, object]) -> bytes:
    match request["command"]:
        case "echo":
            return json.dumps(request).encode()
        case "large":
            return b"x" * 2**22
        case "hang":
            await anyio.sleep_forever()
    raise ControlError("unknown command")


async def named(name: bytes, _: Mapping[str, object]) -> bytes:
    return name


@asynccontextmanager
async def serving(directory: Path, handler=echo) -> AsyncIterator[None]:
    """An agent's control socket, once it is there or clearly will not be."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: serve(directory, handler, poll=0.01))
        await anyio.sleep(0.05)
        yield
        tasks.cancel_scope.cancel()


async def ask(directory: Path, command: str, **arguments: object) -> bytes:
    return await anyio.to_thread.run_sync(lambda: call(directory, command, **arguments))


async def answered(directory: Path, expected: bytes) -> None:
    with anyio.fail_after(5):
        while True:
            try:
                assert await ask(directory, "who") == expected
            except NoAgentError:
                await anyio.sleep(0.01)
            else:
                return


async def test_a_question_is_answered_by_whoever_serves_there(kubelet_dir):
    directory = kubelet_dir / "state"
    async with serving(directory):
        path = directory / SOCKET
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for seconds in (60, None, [1]):
            sent = {"command": "echo", "seconds": seconds}
            assert json.loads(await ask(directory, **sent)) == sent
        assert len(await ask(directory, "large")) == 2**22
        with pytest.raises(ControlError, match=r"^unknown command$"):
            await ask(directory, "other")
    assert not path.exists()
    with pytest.raises(NoAgentError, match=f"{path}: No such file or directory; run this in"):
        call(directory, "echo")


async def test_a_second_agent_disturbs_the_first_in_nothing_and_takes_over_at_its_end(
    kubelet_dir, caplog
):
    """Fault 9's neighbour: two agents with one state directory."""
    async with anyio.create_task_group() as tasks:
        async with serving(kubelet_dir, lambda r: named(b"first", r)):
            tasks.start_soon(lambda: serve(kubelet_dir, lambda r: named(b"second", r), poll=0.01))
            await anyio.sleep(0.1)
            assert await ask(kubelet_dir, "who") == b"first"
            assert caplog.text.count("another process serves") == 1
        await answered(kubelet_dir, b"second")
        tasks.cancel_scope.cancel()
    assert not (kubelet_dir / SOCKET).exists()


@pytest.mark.parametrize("by", ["unlinked", "replaced", "the directory was moved"])
async def test_a_socket_that_is_taken_away_is_made_again(kubelet_dir, by):
    """Fault 9: `status` found no agent, since the file that it was locked by was unlinked."""
    directory = kubelet_dir / "state"
    async with serving(directory):
        path = directory / SOCKET
        if by == "the directory was moved":
            directory.rename(kubelet_dir / "moved")
        else:
            path.unlink()
        if by == "replaced":  # by one that nobody listens on any more
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
        with anyio.fail_after(5):
            while True:
                try:
                    await ask(directory, "echo")
                except NoAgentError:
                    await anyio.sleep(0.01)
                else:
                    break


async def test_out_of_descriptors_for_a_moment_it_answers_after_it(kubelet_dir):
    """accept() failed, and that ended the agent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(kubelet_dir):
        with socket.socket(socket.AF_UNIX) as client:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                client.connect(str(kubelet_dir / SOCKET))
                await anyio.sleep(0.1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert json.loads(await ask(kubelet_dir, "echo")) == {"command": "echo"}


async def test_what_another_agent_serves_is_not_removed_at_the_end(kubelet_dir):
    async with anyio.create_task_group() as tasks:
        async with serving(kubelet_dir, lambda r: named(b"first", r)):
            (kubelet_dir / SOCKET).unlink()
            tasks.start_soon(lambda: serve(kubelet_dir, lambda r: named(b"second", r), poll=1))
            await answered(kubelet_dir, b"second")
        await answered(kubelet_dir, b"second")
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "what", ["a file", "a directory", "a directory above that is a file", "a long path"]
)
async def test_where_it_cannot_serve_the_agent_runs_on_and_says_so_once(kubelet_dir, caplog, what):
    directory = kubelet_dir / "state"
    if what == "a directory above that is a file":
        directory.write_text("")
    elif what == "a long path":
        directory /= "x" * 110
    else:
        directory.mkdir()
        (directory / SOCKET).mkdir() if what == "a directory" else (directory / SOCKET).write_text(
            ""
        )
    async with serving(directory):
        await anyio.sleep(0.1)
        assert caplog.text.count("will not find this agent") == 1
        with pytest.raises(NoAgentError):
            await ask(directory, "echo")
    if what in ("a file", "a directory"):
        assert (directory / SOCKET).exists()  # it is somebody's


async def test_a_read_only_directory_is_said_so(kubelet_dir, caplog, monkeypatch):
    """As root may write anywhere, the system's answer is put in its place."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    async with serving(kubelet_dir / "state"):
        assert f"{kubelet_dir / 'state' / SOCKET}: Read-only file system" in caplog.text


# Peers that mean no good


REQUESTS = [
    b"\n",
    b"{}\n",
    b"[]\n",
    b'{"command": 7}\n',
    b"\xff\xfe\n",
    b'{"command": "echo"',
    b"[" * 4000 + b"\n",
    b"x" * 10_000 + b"\n",
    b'{"command": ' + b"9" * 4050 + b"}\n",
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
async def test_what_is_no_request_is_refused_and_the_next_one_is_answered(kubelet_dir, number):
    async with serving(kubelet_dir):
        async with await anyio.connect_unix(kubelet_dir / SOCKET) as stream:
            await stream.send(REQUESTS[number])
            await stream.send_eof()
            answer = b""
            try:
                while True:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
        # What is left unread of a request that is too long resets the connection.
        assert answer or len(REQUESTS[number]) > control.MAX_REQUEST
        assert not answer or json.loads(answer)["error"].startswith("a request is")
        assert await ask(kubelet_dir, "echo")


async def test_peers_that_hang_hold_nobody_up_and_are_cut(kubelet_dir, monkeypatch):
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.3)
    async with serving(kubelet_dir):
        hanging = [await anyio.connect_unix(kubelet_dir / SOCKET) for _ in range(20)]
        await hanging[0].send(b'{"comm')
        async with await anyio.connect_unix(kubelet_dir / SOCKET) as gone:
            await gone.send(b'{"command": "large"}\n')  # and does not read the answer
        assert await ask(kubelet_dir, "echo")
        with pytest.raises(ControlError, match="no answer within"):
            await ask(kubelet_dir, "hang")
        for stream in hanging:
            with anyio.fail_after(5):
                assert b"no answer within" in await stream.receive()
            await stream.aclose()


ANSWERS = [
    b"",
    b"\n",
    b"[]\n",
    b"7\n",
    b"not json\n",
    b"{}\n",
    b'{"bytes": 10}\nfour',
    b'{"bytes": -1}\nfour',
    b'{"bytes": Infinity}\n',
    b'{"bytes": "x"}\n',
    b'{"bytes": null}\n',
    b"[" * 4096,
    b"x" * 5000,
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_an_answer_of_something_else_is_no_agent(kubelet_dir, number):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(kubelet_dir / SOCKET))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(control.MAX_REQUEST)
                connection.sendall(ANSWERS[number])

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(NoAgentError, match=r"not a vgpu-agent|breaks off"):
            call(kubelet_dir, "report")
        thread.join()


def test_an_agent_that_does_not_answer_is_not_waited_for_for_ever(kubelet_dir, monkeypatch):
    monkeypatch.setattr(control, "ANSWER_SECONDS", -0.9)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(kubelet_dir / SOCKET))
        listener.listen()
        with pytest.raises(NoAgentError, match="timed out"):
            call(kubelet_dir, "report")
    assert os.path.exists(kubelet_dir / SOCKET)  # noqa: PTH110
    with pytest.raises(NoAgentError, match="Connection refused"):
        call(kubelet_dir, "report")
