"""What Prometheus reads of a server."""

from __future__ import annotations

from typing import Any

import prometheus_client as prometheus

from blocks.serving.server import Server


class Metrics:
    """Counts what was asked and made, for `/metrics`.

    Args:
        server: a `blocks.Server`.
    """

    def __init__(self, server: Server) -> None:
        # One of its own: several applications may be in one process.
        self._registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"namespace": "blocks", "registry": self._registry}
        self._asked = prometheus.Counter(
            "requests", "Requests that were taken.", ["endpoint"], **own
        )
        self._ended = prometheus.Counter(
            "answers", "Answers, by how they ended.", ["finish_reason"], **own
        )
        self._prompt = prometheus.Counter(
            "prompt_tokens", "Tokens of the prompts that were answered.", **own
        )
        self._new = prometheus.Counter("new_tokens", "Tokens of answers.", **own)
        for name, text, read in (
            ("running", "Requests that have a row.", lambda: server.running),
            ("waiting", "Requests that wait for a row.", lambda: server.waiting),
            ("made_tokens", "Tokens made, all in all.", lambda: server.tokens_made),
            (
                "prefixes_reused",
                "Prompts whose beginning was there.",
                lambda: server.prefixes.reused,
            ),
        ):
            prometheus.Gauge(name, text, **own).set_function(read)

    def asked(self, endpoint: str, count: int) -> None:
        """Counts requests that were taken."""
        self._asked.labels(endpoint).inc(count)

    def made(self, answer: Any) -> None:
        """Counts an answer, a `blocks.Completion`."""
        self._ended.labels(answer.finish_reason).inc()
        self._prompt.inc(answer.prompt_length)
        self._new.inc(len(answer.token_ids))

    def text(self) -> tuple[bytes, str]:
        """Returns what Prometheus reads, and its content type."""
        return prometheus.generate_latest(
            self._registry
        ), prometheus.CONTENT_TYPE_LATEST
