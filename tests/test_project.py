"""The README, the pages in docs, the layout and the files around the code are correct."""

import ast
import re
import subprocess
import sys

from pipeline.contract.contract import DUPLICATE, OTHER_REASONS
from pipeline.delta.tables import bronze_tables, silver_tables
from pipeline.spark.java import DELTA, KAFKA_SOURCE, SPARK_JARS

import pytest

from helpers.processes import REPOSITORY, manual
from readings import CONTRACT

README, READINGS, *OTHERS = (
    path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", REPOSITORY / "docs" / "readings.md", *(REPOSITORY / "docs").glob("*.md"))
)
PAGES = "\n".join([README, *OTHERS])
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_a_script_that_the_pages_name_exists(script):
    assert script in README
    named = {
        option
        for call in re.findall(rf"(?<!\w){re.escape(script)}((?: +[^\s`|&]+)*)", PAGES)
        for option in re.findall(r"--[a-z-]+", call)
    }
    assert named <= set(re.findall(r"--[a-z-]+", manual(script))), named


def test_the_options_that_the_pages_name_alone_exist():
    known = {option for script in SCRIPTS for option in re.findall(r"--[a-z-]+", manual(script))}
    assert set(re.findall(r"`(--[a-z-]+)`", PAGES)) <= known


def test_what_the_pages_point_at_is_there():
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_readme_is_short():
    assert README.count("\n") <= 180


def test_the_layout_is_the_one_of_the_readme():
    layout = README.split("## Layout")[1]
    for name in re.findall(r"^([\w./-]+)(?:  ([\w./-]+))?", layout, re.MULTILINE):
        for path in filter(None, name):
            assert (REPOSITORY / path).exists(), path
    for script in SCRIPTS:
        assert script in layout


ROOMS = [
    "paths",
    "terminal",
    "spark",
    "contract",
    "delta",
    "streaming",
    "files",
    "kafka",
    "readers",
    "sample",
    "dashboard",
    "simulator",
]
STRANGERS = [
    {"files", "kafka"},
    {"readers", "streaming"},
    {"readers", "files"},
    {"readers", "kafka"},
    {"dashboard", "streaming"},
    {"dashboard", "files"},
    {"dashboard", "readers"},
    {"dashboard", "sample"},
    {"sample", "streaming"},
]


def test_imports_between_rooms_go_one_way_and_no_script_imports_another():
    """A package or module may import only from those before it in ROOMS. Those paired in STRANGERS may not import from each
    other at all.
    """
    for file in (*REPOSITORY.glob("*.py"), *(REPOSITORY / "pipeline").rglob("*.py")):
        place = file.relative_to(REPOSITORY)
        room = place.parts[1].removesuffix(".py") if place.parts[0] == "pipeline" else ""
        for name in re.findall(r"^ *(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE):
            assert f"{name}.py" not in SCRIPTS, (place, name)
            other = name.split(".")[1] if name.startswith("pipeline.") else room
            if room in ROOMS and other != room:
                assert ROOMS.index(other) < ROOMS.index(room) and {room, other} not in STRANGERS, (place, name)


def test_private_parts_of_libraries_are_used_in_private_modules_only():
    """Further exceptions: pipeline/spark/session.py, which starts Spark, and documented names that begin with "_"."""
    documented = {"_asdict", "_exit", "_get_help_string", "_replace"}
    for file in (*REPOSITORY.glob("*.py"), *(REPOSITORY / "pipeline").rglob("*.py")):
        if file.name in ("private.py", "admin.py", "session.py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | documented
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        }
        assert not {name for name in used - own if re.match("_[^_]", name)}, file


def test_the_pages_have_every_reason_and_every_column():
    reasons = re.findall(
        r"^\| (`.*?) \|", READINGS.split("## Why a record is rejected")[1].split("##")[0], re.MULTILINE
    )
    named = re.findall(r"`(\S+)`", " ".join(reasons))
    prefix, expanded = "", []
    for name in named:
        prefix = prefix if name.startswith("…") else name.split("_")[0]
        expanded.append(prefix + name[1:] if name.startswith("…") else name)
    assert expanded == [*CONTRACT.reasons, DUPLICATE, *OTHER_REASONS]
    for tables in (bronze_tables("", CONTRACT.columns), silver_tables("", CONTRACT.columns)):
        for columns in (tables.columns, tables.quarantine_columns):
            assert f"| {', '.join(columns)} |" in README


OF_SPARK = {"Class …S3AFileSystem not found", "The specified bucket does not exist", "Connection refused"}


def test_the_messages_of_the_pages_are_those_of_the_scripts():
    said = []
    for file in (*REPOSITORY.glob("*.py"), *(REPOSITORY / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant):
                said.append(str(node.value))
    table = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8").split("## Messages")[1]
    for message in (
        set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (.*?) \| ", table, re.MULTILINE)))) - OF_SPARK
    ):
        pattern = ".*".join(map(re.escape, re.split(r"…|\d+", message)))
        assert any(re.search(pattern, text) for text in said) or message[0] in ".-_", message


def test_ci_runs_the_test_command_of_the_readme():
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command.endswith("-r tests/requirements.txt && .venv/bin/python -m pytest tests")
    assert "grep -m1 -- '-m pytest' README.md" in (REPOSITORY / ".ci/run").read_text()


def test_the_readme_names_the_packages_that_the_scripts_use():
    [hadoop] = [jar.name.split("-")[-1].removesuffix(".jar") for jar in SPARK_JARS.glob("hadoop-client-api-*.jar")]
    packages = re.search(r"^spark\.jars\.packages +(.*)", PAGES, re.MULTILINE)[1].split(",")
    assert packages[:3] == [DELTA, KAFKA_SOURCE, f"org.apache.hadoop:hadoop-aws:{hadoop}"]


def test_hadoop_has_the_local_file_system_in_which_it_keeps_what_it_sends_to_s3(spark):
    # hadoop-aws, which these tests do not include, requires exactly this class.
    assert spark._jvm.org.apache.hadoop.fs.FileSystem.getLocal(spark._jsc.hadoopConfiguration())


def test_docker_compose_fits_the_schema_of_the_compose_specification():
    check = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            REPOSITORY / "docker-compose.yml",
        ],
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize(
    "file", ["requirements", "requirements-dashboard", "tests/requirements", "benchmarks/requirements"]
)
def test_requirements_are_pinned_and_locked(file):
    wanted = [line for line in (REPOSITORY / f"{file}.in").read_text().splitlines() if line and line[0] not in "#-"]
    assert wanted and all(re.fullmatch(r"[\w\[\]-]+==[\d.]+", line) for line in wanted)
    locked = re.split(r"\n(?=\w)", (REPOSITORY / f"{file}.txt").read_text())
    assert all("--hash=sha256:" in each for each in locked if not each.startswith("#"))
    pins = {each.split()[0].replace("[server]", "") for each in locked}
    assert {line.lower().replace("[server]", "") for line in wanted} <= pins


@pytest.mark.parametrize(
    "path, ignored",
    [
        ("lake/silver/sensor_data/_delta_log/0.json", True),
        ("lake/bronze/sensor_data_quarantine/part-0.parquet", True),
        ("checkpoints/silver_sensor_data/offsets/0", True),
        ("kafka-data/kafka/meta.properties", True),
        ("input/sensor_data/mine.json", True),
        (".venv/pyvenv.cfg", True),
        ("lake/silver/.gitkeep", False),
        ("checkpoints/.gitkeep", False),
        ("input/sensor_data/sample_1.json", False),
    ],
)
def test_generated_data_is_never_in_git_and_its_folders_are(path, ignored):
    check = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=REPOSITORY)
    assert (check.returncode == 0) == ignored
