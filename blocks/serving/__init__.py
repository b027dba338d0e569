"""Serving: requests that join and leave a running batch."""

from blocks.serving.request import Request, ServerBusy
from blocks.serving.server import Server

__all__ = ["Request", "Server", "ServerBusy"]
