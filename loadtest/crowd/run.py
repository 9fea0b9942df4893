"""A run of Locust from its options to its proof, where it is led and in the workers.

The leading process is the master, or the one process there is. It refuses what cannot go well
before anything starts, makes the campaign, tells all processes, gathers the answers, and has the
books checked by a process of its own. Locust itself does the measuring.
"""

import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gevent
import msgspec
from gevent.lock import RLock
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner

from loadtest.books.proof import books_of
from loadtest.crowd import setup
from loadtest.crowd.desk import Booth, Desk, Setting
from loadtest.crowd.options import deeds_of, mix_of, phases_of
from loadtest.crowd.programs import CANNOT, Errand, Watch, end_children, program
from loadtest.crowd.setup import Api, SetupError
from loadtest.crowd.shape import Plan, target
from loadtest.sampler import metrics_address
from loadtest.scenarios import (
    SCENARIOS,
    Deeds,
    Mix,
    Scenario,
    ScenarioError,
    campaign_of_run,
    cards_needed,
    read_campaign,
    run_name,
)
from loadtest.thresholds import read_rules

if TYPE_CHECKING:
    from loadtest.members import Member

PROOF_S: Final = 300.0
ACCOUNTS_S: Final = 30.0
REFUSED: Final = 2


class Run:
    """This process's state of the run. ``booth`` serves its users, ``desk`` the leader."""

    def __init__(self) -> None:
        self.booth = Booth()
        self.desk = Desk()
        self.told = "no run yet\n"
        self._number = 0
        self._ticks = 0
        self._began: float | None = None
        self._finishing = RLock()
        self._worst = 0
        self._plan = Plan(1)
        self._cards: list[Member] = []
        self._made = ""

    def tick(self) -> tuple[int, float] | None:
        """Users at this moment, for the shape."""
        if self._began is not None:
            return target(self._plan, time.time() - self._began)
        first = target(self._plan, 0.0)
        if first is None or not isinstance(self._runner, MasterRunner):
            return first
        # Another figure each time: a start that found no worker ready yet is made again.
        self._ticks += 1
        return first[0], first[1] + self._ticks % 2 / 1_000

    # Before -------------------------------------------------------------------------------------

    def prepare(self, environment: Any) -> None:  # noqa: ANN401 - Locust fills it in bit by bit
        """Look at everything once, so that what is wrong is told before the first user."""
        self._environment = environment
        self._runner = environment.runner
        self._options = environment.parsed_options
        if not isinstance(self._runner, MasterRunner):
            self.booth.join(self._runner)
        if not self.leads:
            self._runner.register_message("sale-stop", lambda **_: self._runner.stop())
            # Registered after the runner's own, which says good-bye, and so called before it.
            environment.events.quitting.add_listener(lambda **_: self._runner.stop())
            return
        try:
            self._look()
        except (SetupError, ScenarioError) as error:
            end_children()
            print(f"loadtest: {error}", file=sys.stderr)
            sys.exit(REFUSED)
        if environment.web_ui is not None:
            environment.web_ui.app.add_url_rule("/proof", "sale_proof", self._show_told)
        gevent.get_hub().NOT_ERROR += (StopTest,)  # it is told in one line, not by a traceback
        # Locust takes up SIGTERM only when a shape is through: till then it would just die.
        gevent.signal_handler(signal.SIGTERM, self._runner.quit)
        self.desk.join(environment)

    @property
    def leads(self) -> bool:
        """Whether this process leads the test: the master, or the one process there is."""
        return not isinstance(self._runner, WorkerRunner)

    def _show_told(self) -> tuple[str, dict[str, str]]:
        return self.told, {"Content-Type": "text/plain; charset=utf-8"}

    def mix(self) -> Mix:
        """The mix of users, by scenario or options."""
        return mix_of(self._options, self._scenario)

    def deeds(self) -> Deeds:
        """The operator's steps, by scenario or options."""
        return deeds_of(self._options, self._scenario)

    def _look(self) -> None:
        told = self._options
        self._scenario: Scenario | None = SCENARIOS[told.scenario] if told.scenario else None
        if not (told.scenario or told.campaign):
            raise SetupError("give --scenario NAME, or --campaign ID of one that there is")
        if not told.host:
            raise SetupError("give --host, the engine's address: http://host:port")
        self._find_books()
        if not self.mix().all:
            raise SetupError("nobody comes: one of --members, --refreshers, --bots must be above 0")
        for option, given, least in (("-u", told.num_users, 1), ("-r", told.spawn_rate, 0.001)):
            if given is not None and given < least:
                raise SetupError(f"{option} {given:g}: must be above 0")
        if told.num_users is None:
            told.num_users = self._scenario.users if self._scenario else 1
        if told.spawn_rate is None:
            told.spawn_rate = 100.0
        self._api = Api(told.host)
        # Locust puts paths, which begin with a slash, behind what it was given.
        told.host = self._environment.host = self._api.host
        self._api.now()
        table = setup.find_campaign(self._api, told.campaign) if told.campaign else None
        self._probe(told.campaign)
        self._plan = self._planned(table)
        self._unions = (table or read_campaign(told.scenario))["unions"]
        if self.deeds().any or not table:
            self._api.token = setup.operator_token(told.data_dir, told.operator_token_file)
            self._api.must(200, "GET", f"{setup.ADMIN}?limit=1", "the operator's token")
        self._take_cards()

    def _find_books(self) -> None:
        """Where the options do not say, the engine's settings do. Raises SetupError."""
        told = self._options
        try:
            read_rules(told.fail_if)
            self._where = books_of(told.data_dir, told.database_url, told.redis_url)
        except ValueError as error:
            raise SetupError(str(error)) from None
        if not self._where.known:
            raise SetupError("the books must be checked: give --data-dir, or --database-url")
        told.data_dir = self._where.data_dir

    def _planned(self, campaign: dict[str, Any] | None) -> Plan:
        told = self._options
        users, rate = int(told.num_users), float(told.spawn_rate or 100.0)
        run_s = float(told.run_time or 0)
        if self._scenario is None:
            return Plan(users, rate, run_s)
        opens_in_s = None if campaign is None else setup.opens_in(self._api, campaign)
        return Plan(users, rate, run_s, phases_of(told, self._scenario, opens_in_s))

    def _take_cards(self) -> None:
        told, mix = self._options, self.mix()
        needed = cards_needed(mix, self._plan.users, int(self.deeds().any))
        if len(self._cards) < needed:
            self._cards = setup.find_cards(
                told.tokens,
                told.data_dir,
                needed,
                unions=self._unions,
                own_share=self._scenario.own_share if self._scenario else 1.0,
            )

    def _probe(self, campaign: str) -> None:
        errand = Errand(what="probe", where=self._where, campaign=campaign)
        status, said = program(errand, within_s=60.0)
        if status:
            raise SetupError(said.strip() or "the books cannot be reached")

    # The run ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the campaign, open the desk, tell everybody. Raises StopTest."""
        if not self.leads:
            return
        try:
            setting = self._open()
            self.desk.open(setting, self._cards, self._answers)
        except (SetupError, ScenarioError, OSError) as error:
            self._close_campaign()
            self.told = f"loadtest: {error}\n"
            print(f"loadtest: {error}", file=sys.stderr)
            self._environment.process_exit_code = REFUSED
            raise StopTest(str(error)) from None
        self._began = time.time()
        # Until the books have been read nothing is proven, however this process may end.
        self._environment.process_exit_code = CANNOT
        print(f"loadtest: {self._plan.users:,} users, campaign {setting.campaign}", flush=True)

    def _open(self) -> Setting:
        told = self._options
        self._close_campaign()  # of a run that never began, or was never ended
        table = setup.find_campaign(self._api, told.campaign) if told.campaign else None
        self._plan = self._planned(table)
        self._alone = False
        self._take_cards()
        if table is None:
            table = self._make_campaign()
        self._campaign = table
        self._folder = Path(tempfile.mkdtemp(prefix="sale-locust-"))
        if told.out:
            Path(told.out).mkdir(parents=True, exist_ok=True)
        self._answers = Path(told.out or self._folder) / "answers.jsonl"
        folder = Path(told.data_dir) if told.data_dir else None
        metrics = told.metrics or metrics_address(folder)
        self._errand = Errand(
            what="watch",
            where=self._where,
            campaign=table["id"],
            metrics=metrics,
            seen=str(self._folder / "seen.json"),
            answers=str(self._answers),
            out=told.out,
        )
        self._watch = Watch()
        if told.out and metrics:
            self._watch.start(self._errand)
        self._number += 1
        return self._setting_of(table)

    def _make_campaign(self) -> dict[str, Any]:
        told, scenario, phases = self._options, self._scenario, self._plan.phases
        if scenario is None or phases is None:
            raise SetupError("no campaign and no scenario")
        members = cards_needed(self.mix(), self._plan.users, int(self.deeds().any))
        opens_in_s = max(phases.opens_after_s, setup.EARLIEST_OPENING_S)
        table = campaign_of_run(
            scenario,
            read_campaign(told.scenario),
            identifier=run_name(told.scenario),
            opens_at=self._api.now() + timedelta(seconds=opens_in_s),
            users=members,
            full_stock=told.full_stock,
        )
        made: dict[str, Any] = self._api.must(201, "POST", setup.ADMIN, "not made", body=table)
        self._made = str(made["id"])
        # Nobody else buys here. Where stock is added, a refusal as sold out is untrue at the end.
        self._alone = not self.deeds().raises
        self._probe(self._made)
        return made

    def _setting_of(self, campaign: dict[str, Any]) -> Setting:
        deeds = self.deeds()
        stock = sum(showing["tickets"] for showing in campaign["showings"])
        raised = deeds.raise_tickets or round(stock * deeds.raise_share)
        phases = self._plan.phases
        return Setting(
            run=self._number,
            campaign=campaign["id"],
            showings=tuple(showing["id"] for showing in campaign["showings"]),
            order_max=campaign["order_max"],
            tail_s=phases.tail_s if phases else 0.0,
            raise_tickets=raised,
            raises=min(deeds.raises, raised),
            pauses=deeds.pauses,
            operator_token=self._api.token if deeds.any else "",
        )

    def finish(self) -> None:
        """Gather what is still out, check the books, and say so by the exit status."""
        if not isinstance(self._runner, MasterRunner):
            self.booth.account()
        if self.leads:
            self._conclude(self._environment.stop_timeout + ACCOUNTS_S)

    def _conclude(self, patience_s: float) -> None:
        with self._finishing:
            if self._began is not None:
                ended = time.time()
                self.desk.gather(patience_s)
                self._close(self._began, ended)
                self._began = None

    def _close(self, began: float, ended: float) -> None:
        self._watch.end()
        self._close_campaign()
        findings = self.desk.close()
        errand = msgspec.structs.replace(
            self._errand,
            what="prove",
            name=self._options.scenario or "locust",
            started_at=began,
            ended_at=ended,
            alone=self._alone,
            plan=self._plan_told(),
            findings=findings,
            fail_if=self._options.fail_if,
        )
        done, self.told = program(errand, within_s=PROOF_S)
        print(self.told, end="", flush=True)
        print(f"loadtest: {self.desk.answers:,} answers compared, exit {done}")
        status = done if done in (0, 1) else CANNOT
        shutil.rmtree(self._folder, ignore_errors=True)
        if status == 0 and self._runner.exceptions:
            status = 1  # a user of ours broke: what it should have asked was not asked
        self._worst = max(self._worst, status)
        self._environment.process_exit_code = self._worst

    def quit(self) -> None:
        """Before Locust goes: end a test that is still on, finish a proof that was cut short."""
        if self.leads and self._began is not None:
            self._runner.stop()
            self._conclude(0.0)  # nobody listens to the workers any more
        if self.leads:
            self._close_campaign()

    def _close_campaign(self) -> None:
        made, self._made = self._made, ""
        try:
            if made:
                self._api.close(made)
        except SetupError as error:
            print(f"loadtest: {error}", file=sys.stderr)

    def _plan_told(self) -> dict[str, str | int | float]:
        plan, mix = self._plan, self.mix()
        told: dict[str, str | int | float] = {
            "driver": "locust",
            "users": plan.users,
            "members": mix.members,
            "refreshers": mix.refreshers,
            "bots": mix.bots,
            "processes": max(len(self.desk.received), 1),
        }
        if plan.phases is not None:
            told |= msgspec.to_builtins(plan.phases)
        return told


RUN: Final = Run()
