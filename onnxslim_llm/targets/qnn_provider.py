"""The Qualcomm plug-in of ONNX Runtime (PyPI: onnxruntime-qnn): sessions on the Hexagon processor or its simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["EXTRA", "PACKAGE", "PROVIDER", "qnn_options"]

PACKAGE = "onnxruntime-qnn"
EXTRA = "qnn"
PROVIDER = "QNNExecutionProvider"


def qnn_options(provider_options: Mapping[str, str], entries: Mapping[str, str]) -> ort.SessionOptions:
    """Return session options for the HTP backend.

    Args:
        provider_options: Of the plug-in, such as {"htp_arch": "75"}.
        entries: Session config entries.

    Raises:
        ImportError: onnxruntime-qnn is not installed.
        RuntimeError: The plug-in shows no device.
    """
    import onnxruntime as ort
    import onnxruntime_qnn as plugin

    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:  # a library may be registered once in a process
        ort.register_execution_provider_library(PROVIDER, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise RuntimeError(f"{PACKAGE} shows no device")
    options = ort.SessionOptions()
    options.add_provider_for_devices(devices[:1], {"backend_path": plugin.get_qnn_htp_path(), **provider_options})
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options
