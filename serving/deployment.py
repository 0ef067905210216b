"""The model as one Ray Serve deployment."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from infra.chat import load_codec
from infra.contracts import read_manifest
from infra.errors import ArtifactError, EngineError
from serving.config import ServeJob
