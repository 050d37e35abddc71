"""What the server knows of each node: by Flower's node id, and of a bounded number of them.

A node that is forgotten, or that comes under another id, is as new as any other; what it has kept
still counts, for it says which version it has and which update it sent last.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from compeft_fl.errors import StateError
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING
from compeft_fl.exchange.protocol import Answer
from compeft_fl.server.upload_budget import LinkTimes

__all__ = ["Node", "NodeTable"]

MAX_NODES = 1 << 16  # that are remembered


@dataclass
class Node:
    """What is known of a node: what it keeps, ids of updates of its, its rank and its link."""

    version: int = NOTHING
    carried: int = NOTHING  # version of the tensors beside the task vector
    taken: bytes = NO_UPDATE  # last
    sent: bytes = NO_UPDATE  # in the reply that is being read
    rank: int = 0  # of its adapter; 0: all of the server's
    link: LinkTimes = field(default_factory=LinkTimes)


class NodeTable:
    """Nodes by their ids; beyond `MAX_NODES`, those last heard of."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, Node] = OrderedDict()  # last heard of last

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, node_id: int) -> Node | None:
        """What is known of a node; None where nothing is."""
        return self._nodes.get(node_id)

    def heard(self, node_id: int, answer: Answer) -> None:
        """Note what a node says of itself."""
        known = self._nodes.get(node_id)
        if known is None:
            known = self._nodes[node_id] = Node(taken=self._taken_of(answer))
        known.version, known.carried = answer.version, answer.carried
        known.sent, known.rank = answer.update, answer.rank
        if answer.link:
            known.link.stated = answer.link
        self._nodes.move_to_end(node_id)
        while len(self._nodes) > MAX_NODES:
            self._nodes.popitem(last=False)

    def took(self, node_id: int) -> None:
        """Note that the update in a node's reply was merged."""
        known = self._nodes.get(node_id)
        if known is not None and known.sent != NO_UPDATE:
            known.taken, known.sent = known.sent, NO_UPDATE

    def _taken_of(self, answer: Answer) -> bytes:
        """Which update of a new node was taken last.

        Another id may have been its own: then it asks, and only it knows the id of that update.
        """
        sent = answer.update if answer.resync else NO_UPDATE
        if sent != NO_UPDATE and any(node.taken == sent for node in self._nodes.values()):
            return sent
        return answer.taken

    def state(self) -> dict[str, list[Any]]:
        """Versions and last update by node id, as plain values for a checkpoint."""
        return {
            str(i): [node.version, node.taken.hex(), node.carried, node.rank, node.link.stated]
            for i, node in self._nodes.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        StateError
            It is not what this version writes.
        """
        try:
            self._nodes = OrderedDict(
                (int(node_id), _node(*told)) for node_id, told in state.items()
            )
        except (TypeError, ValueError) as error:
            raise StateError(
                f"expected versions and last update by node id, found another version's: {error}"
            ) from None


def _node(version: Any, taken: str, carried: Any, rank: Any = 0, mbps: Any = 0.0) -> Node:
    """A node as a checkpoint has it."""
    return Node(
        int(version), int(carried), bytes.fromhex(taken), rank=int(rank),
        link=LinkTimes(stated=float(mbps)),
    )  # fmt: skip
