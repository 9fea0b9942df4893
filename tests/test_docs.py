"""The documents name only things that exist, and name each thing that they must."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_metrics_health import NAMES

from sale import config
from sale.api.problems import problem_body
from sale.cli.main import COMMANDS, sale
from sale.domain.problem import Problem
from sale.http.client_address import ClientAddresses
from sale.jobs.keeper import KeeperMetrics
from sale.jobs.scheduler import SchedulerMetrics
from sale.jobs.writer import LedgerMetrics
from sale.metrics import LoadMetrics, PurchaseMetrics, new_registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
INVARIANTS = (ROOT / "docs/INVARIANTS.md").read_text("utf-8")
SOURCES = {path: path.read_text("utf-8") for path in sorted((ROOT / "sale").rglob("*.py"))}
MIGRATIONS = "\n".join(
    path.read_text("utf-8") for path in sorted((ROOT / "sale/db/migrations").glob("*.sql"))
)
ENGINE_SERVICES = {"migrate", "api", "writer", "scheduler", "keeper", "cli"}


def _outside_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_each_document_exist(doc: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _outside_code(doc.read_text("utf-8"))):
        if not target.startswith(("http://", "https://", "#")):
            assert (doc.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_each_document_exist(doc: Path) -> None:
    text = doc.read_text("utf-8")
    named = re.findall(
        r"(?<![\w/.])((?:sale|loadtest|tests|docs|scripts|config)/[\w./-]+[\w])(?![\w/]*\{)", text
    )
    for name in named:
        if name == "config/sale.toml":  # the operator's own
            continue
        assert (ROOT / name).exists(), name


def _commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found[f"{prefix}{name}"] = command
        if isinstance(command, click.Group):
            found |= _commands(command, f"{prefix}{name} ")
    return found


def test_commands_named_in_the_documents_exist() -> None:
    commands = _commands(sale)
    shared = {option for parameter in sale.params for option in parameter.opts}
    seen = set()
    for doc in DOCS:
        for call in re.findall(
            r"(?:`|^|\$\()sale ([a-z][^`\n#]*)", doc.read_text("utf-8"), re.MULTILINE
        ):
            words = call.split()
            name = " ".join(words[:2]) if " ".join(words[:2]) in commands else words[0]
            assert name in commands, f"{doc.name}: sale {call}"
            command = commands[name]
            if isinstance(command, click.Group) and len(words) > 1:
                assert words[1].startswith("-"), f"{doc.name}: sale {call}"
            options = {option for parameter in command.params for option in parameter.opts}
            for option in re.findall(r"(?<!\S)--[a-z-]+", call):
                assert option in options | shared | {"--help"}, f"{doc.name}: sale {call}"
            seen.add(name)
    assert {"up", "serve", "writer", "scheduler", "keeper", "migrate", "audit", "doctor"} <= seen


def test_table_of_settings_is_complete_and_true() -> None:
    rows = {
        key: (name, default)
        for key, name, default in re.findall(
            r"^\| `(\w+)` \| `(SALE_\w+)` \| ([^|]+?) \|", OPERATIONS, re.MULTILINE
        )
    }
    assert {name: key for key, (name, _) in rows.items()} == config.ENVIRONMENT
    defaults = config.Settings()
    assert set(rows) == set(defaults.__struct_fields__)
    for key, (_, told) in rows.items():
        value = getattr(defaults, key)
        if value is not None:
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            assert told.strip("`") == shown, key


def test_tests_named_in_the_fault_table_exist() -> None:
    text = (ROOT / "docs/FAULTS.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_example_settings_are_accepted(tmp_path: Path) -> None:
    text = (ROOT / "config/sale.toml.example").read_text("utf-8")
    lines = re.findall(r"^# (\w+ = .+)$", text, re.MULTILINE)
    assert {line.split(" = ")[0] for line in lines} == set(config.ENVIRONMENT.values())
    file = tmp_path / "sale.toml"
    file.write_text("\n".join(line for line in lines if "signing_key =" not in line), "utf-8")
    loaded = config.load(file, environment={})
    assert loaded.batch_max == config.Settings().batch_max


@pytest.mark.parametrize("place", ["Dockerfile", "docker-compose.yml", *map(str, DOCS)])
def test_settings_named_in_each_file_exist(place: str) -> None:
    text = (ROOT / place).read_text("utf-8")
    assert set(re.findall(r"\bSALE_[A-Z_]*[A-Z]\b", text)) <= set(config.ENVIRONMENT)


def _metrics_in_code() -> set[str]:
    registry = new_registry("serve")
    registry.register(PurchaseMetrics())
    registry.register(LoadMetrics())
    LedgerMetrics(registry)
    SchedulerMetrics(registry)
    KeeperMetrics(registry)
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
        if family.name.startswith("sale_")
    }


def test_metrics_match_contract_and_documents() -> None:
    in_code = _metrics_in_code()
    section = OPERATIONS.partition("## Metrics")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
    assert in_code >= NAMES.keys()
    assert set(re.findall(r"\bsale_\w+", table)) == in_code


def test_alerts_use_real_metrics_and_are_explained() -> None:
    text = (ROOT / "config/deploy/alerts.yml").read_text("utf-8")
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    for rule in rules:
        for name in re.findall(r"\bsale_\w+", rule["expr"]):
            assert name.removesuffix("_bucket") in _metrics_in_code(), rule["alert"]
        assert re.search(rf"^\| .*\b{rule['alert']}\b", OPERATIONS, re.MULTILINE), rule["alert"]
    prometheus = yaml.safe_load((ROOT / "config/deploy/prometheus.yml").read_text("utf-8"))
    assert prometheus["rule_files"] == ["alerts.yml"]
    assert {"api", "writer", "scheduler", "keeper"} == {
        job["job_name"] for job in prometheus["scrape_configs"]
    }
    (manager,) = prometheus["alerting"]["alertmanagers"]
    assert manager["static_configs"] == [{"targets": ["alertmanager:9093"]}]


@pytest.mark.parametrize(
    "words",
    [
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts_test.yml", "alerts_audit_test.yml"],
    ],
    ids=lambda words: words[0],
)
def test_total_outage_rings_as_promtool_sees_it(words: list[str]) -> None:
    assert shutil.which("promtool"), "Debian package prometheus; scripts/test gets it"
    done = subprocess.run(
        ["promtool", *words],
        cwd=ROOT / "config/deploy",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_routes_of_alerts_lead_to_receivers() -> None:
    told = yaml.safe_load((ROOT / "config/deploy/alertmanager.yml").read_text("utf-8"))
    known = {receiver["name"] for receiver in told["receivers"]}
    used = {told["route"]["receiver"], *(each["receiver"] for each in told["route"]["routes"])}
    assert used == known
    alerts = (ROOT / "config/deploy/alerts.yml").read_text("utf-8")
    rules = [rule for group in yaml.safe_load(alerts)["groups"] for rule in group["rules"]]
    named = set(re.findall(r"\b[A-Z]\w+[a-z]\w*", str(told["inhibit_rules"])))
    assert named
    assert named <= {rule["alert"] for rule in rules}


def test_table_of_logs_lists_each_action() -> None:
    in_code = set()
    for text in SOURCES.values():
        in_code |= set(
            re.findall(
                r"(?:log\.(?:debug|info|warning|error|exception)|_warn_store|_warn)\(\s*(?:#[^\n]*\s*)?\"([\w.]+)\"",
                text,
            )
        )
        # Actions that are looked up in a table before they are logged.
        if re.search(r"log\.\w+\(_(?:LOST|BACK)\[", text):
            in_code |= set(re.findall(r"\"\w+\": \"(ledger\.\w+)\"", text))
    section = OPERATIONS.partition("## Logs")[2]
    listed = set()
    for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE):
        listed |= set(re.findall(r"`([\w.]+)`", row))
    assert len(in_code) > 30
    assert listed == in_code


def test_each_invariant_has_keeper_audit_and_tests() -> None:
    sections = re.split(r"^## (INV-\d+) ", INVARIANTS, flags=re.MULTILINE)
    assert sections[1::2] == [f"INV-{number}" for number in range(1, 12)]
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        assert "\n- Kept by" in text, name
        assert "\n- Audit: " in text, name
        assert re.search(r"\n- Tests: `tests/test_\w+\.py`", text), name


def test_database_rules_named_in_the_invariants_exist() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", INVARIANTS)) - {
        "check_acknowledged", "check_trusted", "synchronous_commit",
        "opens_at", "closes_at", "card_limit", "showing_limit",
    }  # fmt: skip
    assert {"showing_never_oversold", "member_use_within_limit", "orders_one_per_key"} <= named
    for name in named:
        rule = rf"(?i)\b(?:constraint|trigger|index)\s+{name}\b"
        assert re.search(rule, MIGRATIONS), name


def test_architecture_describes_each_table() -> None:
    text = (ROOT / "docs/ARCHITECTURE.md").read_text("utf-8")
    section = text.partition("## PostgreSQL")[2].partition("\n## ")[0]
    made = set(re.findall(r"(?im)^create table (\w+)", MIGRATIONS))
    described = set()
    for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE):
        described |= set(re.findall(r"`(\w+)`", row))
    assert described == made


def _compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))


def test_deployment_uses_real_commands() -> None:
    services = _compose()["services"]
    assert {"redis", "postgres", "balancer", "prometheus", "alertmanager"} | ENGINE_SERVICES == set(
        services
    )
    for name in ENGINE_SERVICES:
        assert services[name]["command"][0] in COMMANDS
        assert set(services[name]["environment"]) <= set(config.ENVIRONMENT)
    for name in ("api", "writer", "scheduler", "keeper"):
        assert services[name]["deploy"]["replicas"] == 2
        assert services[name]["restart"] == "unless-stopped"
    assert 'ENTRYPOINT ["sale"]' in (ROOT / "Dockerfile").read_text("utf-8")


def test_deployment_refers_to_existing_files() -> None:
    compose = _compose()
    for name, service in compose["services"].items():
        unchecked = {"migrate", "cli", "prometheus", "alertmanager"}
        assert "healthcheck" in service or name in unchecked, name
        assert set(service.get("depends_on", {})) <= set(compose["services"]), name
        assert set(service.get("networks", [])) <= set(compose["networks"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            made = source in {"./rosters", "./rehearsals"}  # by what its head says
            assert made or source in compose["volumes"] or (ROOT / source).exists(), volume
    assert set(compose["volumes"]) == {"redis", "postgres", "prometheus", "alertmanager"}
    assert "umask 077" in (ROOT / "docker-compose.yml").read_text("utf-8")


def test_one_image_is_built_once() -> None:
    services = _compose()["services"]
    assert [name for name, service in services.items() if "build" in service] == ["migrate"]
    assert len({services[name]["image"] for name in ENGINE_SERVICES}) == 1
    for name in ENGINE_SERVICES - {"migrate"}:
        assert services[name]["pull_policy"] == "never", name


def test_lock_satisfies_the_ranges_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    text = (ROOT / "config/deploy/requirements.lock").read_text("utf-8")
    assert not re.search(r"https?://|--index-url|--find-links|--trusted-host", text)
    locked = {}
    for entry in re.split(r"\n(?=\w)", text)[1:]:
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        assert "--hash=sha256:" in entry, name
        locked[canonicalize_name(name)] = version
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["loadtest"],
        *project["build-system"]["requires"],
    ]
    for line in map(Requirement, wanted):
        assert locked[canonicalize_name(line.name)] in line.specifier, line
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert "--require-hashes" in dockerfile
    assert "--no-build-isolation" in dockerfile
    assert "!config/deploy/requirements.lock" in (ROOT / ".dockerignore").read_text("utf-8")


def test_nobody_is_told_to_install_sale_by_its_name() -> None:
    """The package of that name on the index is somebody else's."""
    texts = [path.read_text("utf-8") for path in (*DOCS, *SOURCES, ROOT / "Dockerfile")]
    texts += [path.read_text("utf-8") for path in (ROOT / "loadtest").rglob("*.py")]
    for text in texts:
        assert not re.search(r"pip install (?:[^\n`]* )?['\"]?sale(?:\[|['\"\s`]|$)", text)


def test_redis_of_the_deployment_is_durable() -> None:
    text = (ROOT / "config/deploy/redis.conf").read_text("utf-8")
    settings = dict(
        line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["no-appendfsync-on-rewrite"] == "no"
    assert settings["maxmemory-policy"] == "noeviction"


def test_shipped_redis_conf_is_safe_alone_and_opened_by_compose() -> None:
    text = (ROOT / "config/deploy/redis.conf").read_text("utf-8")
    settings = dict(
        line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert settings["bind"] == "127.0.0.1 -::1"
    assert settings["protected-mode"] == "yes"
    assert "dir" not in settings
    command = _compose()["services"]["redis"]["command"]
    assert command[command.index("--bind") + 1] == "*"
    assert command[command.index("--requirepass") + 1].startswith("${REDIS_PASSWORD:?")


def test_balancer_sends_no_request_twice() -> None:
    text = (ROOT / "config/deploy/haproxy.cfg").read_text("utf-8")
    assert re.findall(r"^\s*retry-on (.+)$", text, re.MULTILINE) == ["conn-failure"]
    assert "/readyz" in text


def test_balancer_answers_readyz_itself_but_to_its_host() -> None:
    """A thousand clients that asked for it made buyers ten times slower."""
    text = (ROOT / "config/deploy/haproxy.cfg").read_text("utf-8")
    frontend = text[text.index("frontend members") : text.index("backend api")]
    (rule,) = [line for line in frontend.splitlines() if "readyz" in line]
    assert rule.split()[:4] == ["http-request", "return", "status", "404"]
    pattern = re.search(r"{ path,url_dec -m reg (\S+) } !{ src 127.0.0.0/8 ::1 }", rule)
    assert pattern is not None
    for path, ours in {
        "/readyz": True,
        "/readyz/": True,
        "//readyz": True,
        "/ready": False,
    }.items():
        assert bool(re.search(pattern[1], path)) is ours
    body = re.search(r"string '(.+)' hdr", rule)
    assert body is not None
    assert json.loads(body[1]) == json.loads(problem_body(Problem.NOT_FOUND))


def test_balancer_replaces_a_forged_client_address() -> None:
    """HOLES.md row 22: behind a balancer that is not known all clients are one address."""
    text = (ROOT / "config/deploy/haproxy.cfg").read_text("utf-8")
    assert "http-request set-header X-Forwarded-For %[src]" in text
    assert "option forwardfor" not in text, "it would add one to the client's own"
    compose = _compose()
    (front,) = compose["networks"]["front"]["ipam"]["config"]
    api = compose["services"]["api"]
    assert ip_network(api["environment"]["SALE_TRUSTED_PROXIES"]) == ip_network(front["subnet"])
    assert set(compose["x-engine"]["environment"]) < set(api["environment"])
    assert "ports" not in api, "who comes by the host comes from a trusted address"
    known = ClientAddresses(api["environment"]["SALE_TRUSTED_PROXIES"])
    balancer = str(ip_network(front["subnet"])[2])
    assert known.of(balancer, "198.51.100.7") == "198.51.100.7"
    assert "front" in compose["services"]["balancer"]["networks"]


def test_readme_names_both_commands_and_the_figures() -> None:
    for place in ("demo-output", "bench-output"):
        assert README.index(f"<!-- {place} -->") < README.index(f"<!-- /{place} -->")
    for command in ("./scripts/demo", "./scripts/test"):
        assert f"\n{command}\n" in README


def test_each_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["embedded"]]
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in wanted}
    imported = {
        name.split(".")[0]
        for text in SOURCES.values()
        for node in ast.walk(ast.parse(text))
        for name in _imported(node)
    }
    theirs = imported - sys.stdlib_module_names - {"sale", "loadtest"}
    assert {{"jwt": "pyjwt"}.get(name, name) for name in theirs} <= declared


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_documents_name_no_machine() -> None:
    for doc in [*DOCS, *(ROOT / "config").rglob("*.*"), ROOT / "docker-compose.yml"]:
        assert not re.search(r"/(?:work|root|tmp/w)/", doc.read_text("utf-8")), doc
