"""Messages, queues, workers, the archive: what the commands do."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from support.cases import each_case

from .conftest import bury


@pytest.fixture(autouse=True)
def mail(pgqrs) -> None:
    pgqrs("queue", "create", "mail", "--lease", "1m")


def enqueue(pgqrs, *options: object, payload: str = '{"n": 1}') -> int:
    return pgqrs.json("message", "enqueue", "mail", "--payload", payload, *options)["id"]


@each_case(
    ("text", "seconds"),
    [("30", 30), ("1.5", 1.5), ("1h30m", 5400), ("7d", 604_800), ("2w", 1_209_600), ("500ms", 0.5)],
)
def test_a_delay_is_seconds_or_units(pgqrs, text, seconds):
    (row,) = [pgqrs.json("message", "get", enqueue(pgqrs, "--delay", text))]
    waits = datetime.fromisoformat(row["vt"]) - datetime.fromisoformat(row["enqueued_at"])
    assert waits == timedelta(seconds=seconds)
    assert seconds - 5 < row["visible_in_seconds"] <= seconds


def test_a_lease_has_an_end_and_leaves_the_message_its_place(pgqrs):
    id_ = enqueue(pgqrs)
    before = pgqrs.json("message", "get", id_)
    assert (before["state"], before["leased_until"]) == ("ready", None)
    (delivery,) = pgqrs.json("message", "dequeue", "mail", "--lease", "1h")
    (after,) = pgqrs.json("message", "list", "--queue", "mail")
    assert after["state"] == "leased"
    assert after["vt"] == delivery["vt"] == before["vt"]
    assert after["leased_until"] == delivery["leased_until"]
    end = datetime.fromisoformat(after["leased_until"])
    assert end - datetime.fromisoformat(after["dequeued_at"]) == timedelta(hours=1)
    assert 3500 < after["visible_in_seconds"] <= 3600


@each_case("text", ["", "-5", "1x", "1h 30m", "h", "1h,30m", "5mm", "1e3", "9" * 40])
def test_what_is_no_duration_is_refused(pgqrs, counts, text):
    pgqrs("message", "enqueue", "mail", "--payload", "1", f"--delay={text}", code=2)
    assert counts("mail").live == 0


def test_a_time_needs_its_offset(pgqrs):
    id_ = enqueue(pgqrs, "--at", "2040-01-31T09:00:00+01:00")
    assert pgqrs.json("message", "get", id_)["vt"] == "2040-01-31T08:00:00+00:00"
    naive = pgqrs("message", "enqueue", "mail", "--payload", "1", "--at", "2040-01-31", code=2)
    assert "has no time zone" in naive.stderr


@each_case("payload", ["null", "0", '"text"', "[1, 2]", '{"a": {"b": "é"}}'])
def test_a_payload_is_any_json(pgqrs, payload):
    assert pgqrs.json("message", "get", enqueue(pgqrs, payload=payload))["payload"] == json.loads(
        payload
    )


@pytest.mark.parametrize(
    "command", [["message", "enqueue", "mail", "--payload", "1"], ["message", "reschedule", "1"]]
)
def test_a_delay_and_a_time_exclude_each_other(pgqrs, command):
    pgqrs("queue", "create", "mail")
    both = ["--delay", "1h", "--at", "2030-01-01T00:00:00Z"]
    said = pgqrs(*command, *both, code=2).stderr
    assert "--delay and --at exclude each other: give one of them" in said
    assert "datetime" not in said
    assert pgqrs.json("message", "list") == []


def test_a_payload_comes_from_stdin(pgqrs):
    done = pgqrs("message", "enqueue", "mail", "--payload", "-", "--format", "json", input="[7]")
    assert pgqrs.json("message", "get", json.loads(done.stdout)["id"])["payload"] == [7]


def test_what_is_no_json_is_refused(pgqrs):
    assert "no JSON" in pgqrs("message", "enqueue", "mail", "--payload", "{n:1}", code=2).stderr
    nan = pgqrs("message", "enqueue", "mail", "--payload", '{"a": NaN}', code=2).stderr
    assert "payload.a" in nan


def test_a_key_makes_one_message(pgqrs):
    first = enqueue(pgqrs, "--key", "k")
    again = pgqrs("message", "enqueue", "mail", "--payload", "2", "--key", "k", "--format", "json")
    assert json.loads(again.stdout) | {"vt": 0} == {
        "id": first,
        "queue": "mail",
        "vt": 0,
        "duplicate": True,
    }
    assert "no second one was made" in again.stderr


def test_the_list_shows_a_countdown_and_the_time(pgqrs):
    enqueue(pgqrs, "--delay", "1h30m")
    enqueue(pgqrs)
    heading, waiting, ready = pgqrs("message", "list", "--queue", "mail").stdout.splitlines()
    assert heading.split()[:5] == ["ID", "QUEUE", "STATE", "VISIBLE", "VT"]
    assert "in 1h 29m" in waiting or "in 1h 30m" in waiting
    assert "+0000" in waiting or "+" in waiting
    assert " now " in ready


def test_pages_follow_each_other(pgqrs):
    ids = [enqueue(pgqrs) for _ in range(5)]
    page = pgqrs("message", "list", "--limit", 2, "--format", "json")
    assert [item["id"] for item in json.loads(page.stdout)] == ids[:2]
    assert f"--after {ids[1]}" in page.stderr
    rest = pgqrs.json("message", "list", "--limit", 9, "--after", ids[1])
    assert [item["id"] for item in rest] == ids[2:]


def test_a_list_is_filtered_by_state_and_payload(pgqrs):
    enqueue(pgqrs, "--delay", "1h", payload='{"user": 7}')
    enqueue(pgqrs, payload='{"user": 8}')
    assert len(pgqrs.json("message", "list", "--state", "scheduled")) == 1
    (found,) = pgqrs.json("message", "list", "--payload", '{"user": 8}')
    assert found["state"] == "ready"
    assert pgqrs.json("message", "count", "mail", "--state", "scheduled")["count"] == 1


def test_metrics_separate_the_states(pgqrs, work):
    enqueue(pgqrs, "--delay", "1h")
    enqueue(pgqrs)
    enqueue(pgqrs, "--priority", -1)
    pgqrs("message", "dequeue", "mail")
    bury(work, "mail", "dead", priority=-2)
    row = pgqrs.json("queue", "metrics", "mail")
    names = ("ready", "scheduled", "leased", "exhausted", "live", "dead", "cancelled")
    # bury() leases what was ready, too.
    assert {name: row[name] for name in names} == {
        "ready": 0,
        "scheduled": 1,
        "leased": 2,
        "exhausted": 0,
        "live": 3,
        "dead": 1,
        "cancelled": 0,
    }


def test_the_printed_token_settles_what_was_leased(pgqrs, counts):
    enqueue(pgqrs)
    done = pgqrs("message", "dequeue", "--queue", "mail", "--lock-time", "30", "--format", "json")
    (leased,) = json.loads(done.stdout)
    token = leased["fencing_token"]
    assert f"pgqrs message archive {leased['id']} --token {token}" in done.stderr
    pgqrs("message", "archive", "--id", leased["id"], "--token", token)
    assert counts("mail").archived == 1
    lost = pgqrs("message", "archive", leased["id"], "--token", token, code=1).stderr
    assert f"message {leased['id']} is archived" in lost


def test_a_wrong_token_changes_nothing(pgqrs, counts):
    id_ = enqueue(pgqrs)
    (leased,) = pgqrs.json("message", "dequeue", "mail")
    token = leased["fencing_token"]
    lost = pgqrs("message", "archive", id_, "--token", token + 1, code=1).stderr
    assert "lease lost" in lost
    pgqrs("message", "delete", id_, "--token", token + 1, "--yes", code=1)
    assert counts("mail").leased == 1
    pgqrs("message", "delete", id_, "--token", token, "--yes")
    assert (counts("mail").live, counts("mail").archived) == (0, 0)


def test_a_worker_holds_what_it_leased(pgqrs, counts):
    worker = pgqrs.json("worker", "create", "w", "-q", "mail")["id"]
    id_ = enqueue(pgqrs)
    (leased,) = pgqrs.json("message", "dequeue", "mail", "--worker", worker)
    assert leased["worker_id"] == worker
    assert [item["id"] for item in pgqrs.json("worker", "messages", worker)] == [id_]
    pgqrs("message", "archive", id_, "--token", leased["fencing_token"])
    assert counts("mail").archived == 1


@pytest.mark.parametrize("verb", ["cancel", "archive", "delete"])
def test_without_a_token_only_what_nobody_holds_is_touched(pgqrs, counts, verb):
    yes = ["--yes"] if verb == "delete" else []
    held = enqueue(pgqrs)
    pgqrs("message", "dequeue", "mail")
    assert "is leased until" in pgqrs("message", verb, held, *yes, code=1).stderr
    waiting = enqueue(pgqrs, "--delay", "1h")
    pgqrs("message", verb, waiting, *yes)
    assert (counts("mail").leased, counts("mail").scheduled) == (1, 0)
    assert counts("mail").cancelled == (0 if verb == "delete" else 1)


def test_deleting_one_message_leaves_its_history(pgqrs, work):
    dead = bury(work, "mail", "x")
    receipt = pgqrs.json("dead", "retry", dead)[0]
    pgqrs("message", "cancel", receipt["id"])
    pgqrs("archive", "requeue", pgqrs.json("archive", "list")[0]["id"])
    pgqrs("message", "delete", receipt["id"], "--yes")
    assert pgqrs.json("archive", "list") == []


def test_rescheduling_moves_the_time(pgqrs):
    id_ = enqueue(pgqrs, "--delay", "7d")
    moved = pgqrs.json("message", "reschedule", id_, "--at", "2040-01-01T00:00:00Z")
    assert moved["vt"] == "2040-01-01T00:00:00+00:00"
    pgqrs("message", "reschedule", id_, code=2)


def test_a_paused_queue_gives_nothing(pgqrs):
    enqueue(pgqrs)
    pgqrs("queue", "pause", "mail")
    empty = pgqrs("message", "dequeue", "mail", "--format", "json")
    assert json.loads(empty.stdout) == []
    assert "nothing is visible" in empty.stderr
    pgqrs("queue", "resume", "mail")
    assert len(pgqrs.json("message", "dequeue", "mail")) == 1


def test_a_queue_that_is_there_stays_as_it_is(pgqrs):
    again = pgqrs("queue", "create", "mail", "--lease", "5m", "--format", "json")
    assert json.loads(again.stdout)["lease_seconds"] == 60
    assert "was there already" in again.stderr


def test_the_dlq_command_buries_the_exhausted_and_no_lease(pgqrs, work, counts):
    with work() as service:
        service.enqueue("mail", 1, max_read_ct=1)
        service.dequeue("mail", lease=0.01)
        service.enqueue("mail", 2, max_read_ct=1)
        service.session.execute(__import__("sqlalchemy").text("SELECT pg_sleep(0.05)"))
        service.dequeue("mail")
    (row,) = pgqrs.json("queue", "archive-dlq", "--dry-run")
    assert (row["count"], counts("mail").dead) == (1, 0)
    (row,) = pgqrs.json("queue", "archive-dlq")
    assert (row["count"], counts("mail").dead, counts("mail").leased) == (1, 1, 1)


def test_health_finds_the_silent(pgqrs):
    pgqrs("worker", "create", "w", "-q", "mail")
    pgqrs("worker", "health")
    silent = pgqrs("worker", "health", "--timeout", "0.001s", "--format", "json", code=1)
    assert json.loads(silent.stdout)[0]["healthy"] is False
    assert "hint: pgqrs admin reclaim" in silent.stderr
    pgqrs("queue", "create", "other")
    pgqrs("worker", "health", "other", "--timeout", "0.001s")


@pytest.mark.parametrize("queue", [(), ("--queue", "mail")])
def test_reclaim_takes_back_what_the_silent_hold(pgqrs, counts, queue):
    here = pgqrs.json("worker", "create", "w", "-q", "mail")["id"]
    there = pgqrs.json("worker", "create", "v", "-q", "other")["id"]
    enqueue(pgqrs)
    pgqrs("message", "dequeue", "mail", "--worker", here)
    assert pgqrs.json("admin", "reclaim", *queue, "--older-than", "1h")["count"] == 0
    assert pgqrs.json("admin", "reclaim", *queue, "--older-than", "0.001s")["count"] == 1
    assert counts("mail").ready == 1
    assert pgqrs.json("worker", "get", here)["status"] == "stopped"
    assert pgqrs.json("worker", "get", there)["status"] == ("ready" if queue else "stopped")


def test_a_worker_that_is_not_stopped_is_not_deleted(pgqrs):
    worker = pgqrs.json("worker", "create", "w")["id"]
    refused = pgqrs("worker", "delete", worker, "--yes", code=1).stderr
    assert f"worker {worker} is ready" in refused
    assert f"hint: pgqrs worker stop {worker}" in refused
    pgqrs("worker", "stop", worker)
    pgqrs("worker", "delete", worker, "--yes")
    pgqrs("worker", "get", worker, code=3)


def test_dead_letters_are_retried_and_discarded_by_id(pgqrs, work, counts):
    first, second = bury(work, "mail", 1), bury(work, "mail", 2)
    assert [item["last_error"] for item in pgqrs.json("dead", "list", "mail")] == [
        "ValueError: no such address"
    ] * 2
    pgqrs("dead", "retry", first, "--delay", "1h")
    pgqrs("dead", "discard", "--id", second, "--yes")
    assert (counts("mail").scheduled, counts("mail").dead) == (1, 0)
    pgqrs("dead", "retry", second, code=3)


def test_a_bulk_retry_skips_keys_that_are_live(pgqrs, work, counts):
    for n in range(3):
        bury(work, "mail", n, key=f"k{n}")
    enqueue(pgqrs, "--key", "k1")
    done = pgqrs("dead", "retry", "-q", "mail", "--yes", "--chunk", 2, "--format", "json", code=1)
    row = json.loads(done.stdout)
    assert (row["count"], row["skipped"]) == (2, 1)
    assert (counts("mail").ready, counts("mail").dead) == (3, 1)


def test_archived_ids_of_other_outcomes_are_no_dead_letters(pgqrs):
    pgqrs("message", "cancel", enqueue(pgqrs))
    (row,) = pgqrs.json("archive", "list", "--outcome", "cancelled")
    for verb in ("retry", "discard"):
        assert "no dead letter" in pgqrs("dead", verb, row["id"], "--yes", code=3).stderr


def test_prune_follows_the_retention_unless_told(pgqrs, work):
    pgqrs("queue", "create", "short", "--retention", "0")
    for queue in ("mail", "short"):
        with work() as service:
            service.messages.cancel(service.enqueue(queue, 1).id)
    assert pgqrs.json("archive", "prune", "--yes")["count"] == 1
    assert pgqrs.json("archive", "prune", "--older-than", "1h", "--yes")["count"] == 0
    assert pgqrs.json("archive", "prune", "mail", "--older-than", "0", "--yes")["count"] == 1


@pytest.mark.parametrize("command", [["get"], ["archive"], ["delete", "--yes"]])
def test_a_message_is_named_by_queue_and_id(pgqrs, counts, command):
    pgqrs("queue", "create", "other")
    id_ = enqueue(pgqrs)

    refused = pgqrs("message", *command, "--queue", "other", "--id", id_, code=3)
    assert "in queue 'other'" in refused.stderr
    assert "queue 'mail'" in refused.stderr
    assert "no queue 'mial'" in pgqrs("message", *command, "-q", "mial", "--id", id_, code=3).stderr
    assert counts("mail").live == 1

    assert pgqrs.json("message", *command, "--queue", "mail", "--id", id_)["id"] == id_
    assert counts("mail").live == (command == ["get"])


def test_a_settled_message_of_another_queue_is_not_found(pgqrs):
    pgqrs("queue", "create", "other")
    id_ = enqueue(pgqrs)
    (row,) = pgqrs.json("message", "dequeue", "mail")
    settle = ["message", "archive", "--id", id_, "--token", row["fencing_token"], "--queue"]
    pgqrs(*settle, "mail")
    assert "in queue 'other'" in pgqrs(*settle, "other", code=3).stderr
    assert "lease lost" in pgqrs(*settle, "mail", code=1).stderr


def test_a_named_queue_has_the_metrics_of_pgqrs(pgqrs):
    enqueue(pgqrs)
    enqueue(pgqrs)
    enqueue(pgqrs, "--delay", "1h")
    (held,) = pgqrs.json("message", "dequeue", "mail")
    rows = pgqrs.json("message", "list", "mail")
    row = pgqrs.json("queue", "metrics", "mail")
    expected = {
        "name": "mail",
        "total_messages": 3,
        "pending_messages": 2,
        "locked_messages": 1,
        "archived_messages": 0,
        "oldest_pending_message": next(r["enqueued_at"] for r in rows if r["id"] != held["id"]),
        "newest_message": rows[-1]["enqueued_at"],
    }
    assert {key: row[key] for key in expected} == expected
    pgqrs("message", "archive", held["id"], "--token", held["fencing_token"])
    assert pgqrs.json("queue", "metrics", "mail")["archived_messages"] == 1


def test_a_queue_without_messages_has_no_times(pgqrs):
    row = pgqrs.json("queue", "metrics", "mail")
    assert (row["oldest_pending_message"], row["newest_message"]) == (None, None)


def test_health_prints_who_is_silent_whatever_the_exit_code(pgqrs, work):
    worker = pgqrs.json("worker", "create", "w", "--queue", "mail")["id"]
    ask = ["worker", "health", "--timeout", "0", "--format", "json"]
    for result in (pgqrs(*ask, code=1), pgqrs(*ask, "--exit-zero")):
        (row,) = json.loads(result.stdout)
        assert (row["id"], row["healthy"]) == (worker, False)


@pytest.mark.parametrize("option", ["--attempts", "--max-read-ct"])
def test_attempts_have_one_name_and_that_of_pgqrs(pgqrs, option):
    pgqrs("queue", "create", "other", option, 3)
    assert pgqrs.json("queue", "get", "other")["max_read_ct"] == 3
    pgqrs("queue", "update", "other", option, 4)
    assert pgqrs.json("queue", "get", "other")["max_read_ct"] == 4
    assert pgqrs.json("message", "get", enqueue(pgqrs, option, 2))["max_read_ct"] == 2


def test_the_commands_that_check_say_when_to_use_which(nowhere):
    assert "`schema check`" in nowhere("verify", "--help").stdout
    assert "`verify`" in nowhere("schema", "check", "--help").stdout
    assert "`schema check`" in nowhere("doctor", "--help").stdout
