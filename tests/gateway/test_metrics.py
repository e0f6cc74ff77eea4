"""What is counted of models that are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import StartGateway
from prometheus_client.metrics import MetricWrapperBase

from gateway import metrics


def test_all_that_is_counted_by_model_is_known_to_be() -> None:
    kept = [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase) and "model" in one._labelnames]
    assert sorted(one._name for one in kept) == sorted(one._name for one in metrics.OF_MODELS)


def test_the_figures_of_one_that_is_back_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_gone", {})
    for model in ("back", "gone"):
        metrics.RETRIES.labels(model).inc()
        metrics.goes(model)
    metrics.comes("back")
    for number in range(metrics.GONE_KEPT):
        assert 'model="gone"' in metrics.render().decode()
        metrics.goes(f"other-{number}")
    text = metrics.render().decode()
    assert 'hostler_request_retries_total{model="back"} 1.0' in text
    assert 'model="gone"' not in text


async def test_the_figures_of_models_that_are_gone_do_not_add_up(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()

    async def come_and_go(uid: str, *, is_asked: bool) -> None:
        launch: dict[str, Any] = {"model_uid": uid, "model_path": str(tmp_path / "fake.gguf")}
        assert (await gateway.post("/v1/autostart/models", {"launch": launch})).status == 200
        assert not is_asked or (await gateway.complete(uid)).status == 200
        assert (await gateway.request("DELETE", f"/v1/models/{uid}")).status == 200

    async def text() -> str:
        return (await gateway.get("/metrics")).body.decode()

    await come_and_go("asked", is_asked=True)
    assert 'hostler_requests_total{model="asked"' in await text()  # its last figures are still to be scraped
    for number in range(metrics.GONE_KEPT):
        await come_and_go(f"other-{number}", is_asked=False)
    assert "asked" not in await text()
