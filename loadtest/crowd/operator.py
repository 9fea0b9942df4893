"""The operator on duty at a release."""

import time
from typing import Any, Final

from locust import task

from loadtest.crowd.run import RUN
from loadtest.crowd.users import (
    BACKOFF_S,
    OPENING_MAX_S,
    SaleUser,
    Told,
    again_after_s,
)
from loadtest.wire import asks_again

STEP_TRIES_MAX: Final = 6
STEP_PAUSE_S: Final = 2.0
IDLE_S: Final = 5.0


class OperatorUser(SaleUser):
    """Adds stock in steps, pauses and resumes, and looks whether each step took effect."""

    done = False

    @task
    def duty(self) -> None:
        """All steps of the scenario, once, after the opening; then stay."""
        if self.done:
            self.pause(IDLE_S)
            return
        self.done = True
        setting = RUN.booth.setting
        self.token = setting.operator_token
        self._wait_until("open", OPENING_MAX_S)
        each, rest = divmod(setting.raise_tickets, max(setting.raises, 1))
        for number in range(setting.raises):
            self.pause(STEP_PAUSE_S)
            self._add_stock(each + (number < rest), number)
        for number in range(setting.pauses):
            self.pause(STEP_PAUSE_S)
            self._interrupt(number)

    def _interrupt(self, number: int) -> None:
        """Pause and resume; also where this user is stopped between the two."""
        if not self._step("pause", {"reason": "load test: the hall called"}, f"pause-{number}"):
            return
        try:
            self._wait_until("paused", STEP_PAUSE_S)
            self.pause(STEP_PAUSE_S)
        finally:
            self._step("resume", {"reason": "load test: all is well"}, f"resume-{number}")
        self._wait_until("open", STEP_PAUSE_S)

    def _add_stock(self, tickets: int, number: int) -> None:
        """Add tickets to a showing, ask the same again, and see that they were added once."""
        showing = RUN.booth.setting.showings[number % len(RUN.booth.setting.showings)]
        before = self._tickets(showing)
        body = {"showing": showing, "add": tickets, "reason": "load test: one more screening"}
        done = self._step("stock", body, f"stock-{number}")
        if not done or not self._step("stock", body, f"stock-{number}"):
            return
        after = self._tickets(showing)
        if before is not None and after is not None and after != before + tickets:
            what = f"showing {showing}: {before} and {tickets} added make {after}"
            RUN.booth.find("stock-not-added", what)

    def _tickets(self, showing: str) -> int | None:
        showings = self._campaign().get("showings", ())
        return next((entry["tickets"] for entry in showings if entry["id"] == showing), None)

    def _campaign(self) -> dict[str, Any]:
        path = f"/api/v1/admin/campaigns/{RUN.booth.setting.campaign}"
        for number in range(STEP_TRIES_MAX):
            told = self.call("GET", path, "/api/v1/admin/campaigns/[id]")
            if told.status == 200:
                return dict(told.body)
            self.pause(again_after_s(told.headers, number))
        return {}

    def _step(self, action: str, body: dict[str, Any], key: str) -> bool:
        """One step under one key, until its outcome is known; a refusal is a finding."""
        path = f"/api/v1/admin/campaigns/{RUN.booth.setting.campaign}/{action}"
        name = f"/api/v1/admin/campaigns/[id]/{action}"
        told = Told(0, {}, {})
        for number in range(STEP_TRIES_MAX):
            headers = {"Idempotency-Key": f"run-{RUN.booth.setting.run}-{key}"}
            told = self.call("POST", path, name, json=body, headers=headers)
            if not asks_again(told.status):
                break
            self.pause(again_after_s(told.headers, number))
        if told.status != 200:
            what = f"{action}: {told.status} {told.body.get('detail', '')}"
            RUN.booth.find("operator-refused", what)
        return told.status == 200

    def _wait_until(self, state: str, within_s: float) -> None:
        """Look until the campaign is in a state; a finding where a step of ours did not help."""
        deadline = time.monotonic() + within_s
        while self._campaign().get("state") != state:
            if time.monotonic() > deadline:
                what = f"the campaign is not {state} within {within_s:.0f} s"
                RUN.booth.find("operator-no-effect", what)
                return
            self.pause(BACKOFF_S)
