"""Kinds of other operators that our charts use: definitions of our own, in kinds.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

OUR_KINDS: tuple[dict[str, Any], ...] = tuple(yaml.safe_load(Path(__file__).with_name("kinds.yaml").read_text(encoding="utf-8")))
"""ServiceMonitor, PodMonitor and PrometheusRule of the Prometheus operator, HTTPRoute of the Gateway API."""
