"""Where the agent runs, and advice as commands that can be pasted there.

Commands name node, pod and namespace. What is not known of these stands there as in the runbook:
NAMESPACE, POD.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """The node, and the agent's own pod on it, by their names in Kubernetes."""

    node: str = "NODE"
    namespace: str = "NAMESPACE"
    pod: str = "POD"

    @property
    def in_pod(self) -> bool:
        """Whether the names of the agent's own pod are known."""
        unknown = Place()
        return self.namespace != unknown.namespace and self.pod != unknown.pod

    @property
    def agent(self) -> str:
        """Begins a command in the agent's container."""
        return f"kubectl -n {self.namespace} exec {self.pod} -c agent --"

    @property
    def shell(self) -> str:
        """Begins a command on the node; a shell where none follows."""
        debug = f"kubectl debug node/{self.node} -it --image=busybox --profile=sysadmin"
        return f"{debug} -- chroot /host"

    @property
    def drain(self) -> str:
        """Drains the node."""
        return f"kubectl drain {self.node} --ignore-daemonsets --delete-emptydir-data"

    @property
    def log(self) -> str:
        """The agent's log."""
        return f"kubectl -n {self.namespace} logs {self.pod} -c agent --tail=50"

    @property
    def limits_log(self) -> str:
        """The log of the container that sets memory limits."""
        return f"kubectl -n {self.namespace} logs {self.pod} -c limits --tail=50"

    @property
    def mps_pods(self) -> str:
        """Finds the node's MPS pod."""
        return (
            f"kubectl -n {self.namespace} get pods -l app.kubernetes.io/component=mps"
            f" --field-selector spec.nodeName={self.node}"
        )

    @property
    def mps_pod(self) -> str:
        """The node's MPS pod, as an argument."""
        return f"$({self.mps_pods} -o name)"

    def in_mps(self, container: str) -> str:
        """Begins a command in a container of the node's MPS pod."""
        return f"kubectl -n {self.namespace} exec {self.mps_pod} -c {container} --"

    def mps_log(self, container: str) -> str:
        """The log of a container of the node's MPS pod."""
        return f"kubectl -n {self.namespace} logs {self.mps_pod} -c {container} --tail=50"

    def pods(self, *words: str) -> str:
        """The pods of the node; with words those whose line has one of them."""
        found = "".join(f" -e {word}" for word in words)
        pods = f"kubectl get pods -A -o wide --field-selector spec.nodeName={self.node}"
        return f"{pods} | grep -i{found}" if words else pods


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what it is for."""

    words: str
    command: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, and the commands for it in their order."""

    what: str
    steps: tuple[Step, ...] = ()


def in_a_line(advice: Advice, place: Place) -> str:
    """For a log line: what to do, and how it begins."""
    if not advice.steps:
        return advice.what
    first = f"{advice.what}: {advice.steps[0].command}"
    more = f"; all commands: {place.agent} vgpu-agent status"
    return first + (more if len(advice.steps) > 1 else "")
