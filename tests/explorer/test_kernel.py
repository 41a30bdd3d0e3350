"""The explorer in a real kernel, spoken to as a notebook does: a value that comes while a text grows is heard at once."""

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

BEGIN = """
import steerlens as sl
model = sl.load_model("tiny")
pairs = sl.load_pairs("tiny", instructions="detectable_format:title", n_queries=4)
vector = sl.fit_steering_vector(sl.record_activations(model, pairs))
widget = sl.explore(model, vector, layer=1, positions="prompt", prompt="Describe rain.", max_new_tokens=100)
"""


@pytest.fixture
def kernel() -> Iterator[BlockingKernelClient]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client: Any = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def comms(client: BlockingKernelClient, seconds: float = 120) -> Iterator[dict[str, Any]]:
    """What comes from the kernel's widgets; a cell that fails is the test's failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        assert message["msg_type"] != "error", message["content"]
        if message["msg_type"] in ("comm_open", "comm_msg"):
            yield message["content"]
    raise AssertionError("the kernel said nothing more")


def test_a_value_that_comes_while_a_text_grows_is_heard_between_two_tokens(kernel: BlockingKernelClient) -> None:
    kernel.execute(BEGIN)
    asked: dict[str, Any] = {}
    widget, views = "", []
    for content in comms(kernel):
        state = content["data"].get("state", {})
        if "asked" in state and not asked:
            asked, widget = state["asked"], content["comm_id"]
        if content["comm_id"] != widget or "view" not in state:
            continue
        views.append(state["view"])
        if len(views[-1]["steered"]["tokens"]) == 3 and "layer 1" in views[-1]["plan"]:
            data = {"method": "update", "state": {"asked": {**asked, "layer": 5}}, "buffer_paths": []}
            message = kernel.session.msg("comm_msg", {"comm_id": widget, "data": data})
            kernel.shell_channel.send(message)
        if views[-1]["status"] == "finished":
            break
    assert "layer 5" in views[-1]["plan"]
    lengths = [len(view["unsteered"]["tokens"]) for view in views if "layer 1" in view["plan"]]
    assert max(lengths) < len(views[-1]["unsteered"]["tokens"]), "the first run went on to its end"
    kernel.execute("widget.asked = {**widget.asked, 'coeff': 'much'}")
    states = (content["data"].get("state", {}) for content in comms(kernel))
    refused = next(state["view"] for state in states if "view" in state)
    assert [control for control, _ in refused["problems"]] == ["coeff"]
