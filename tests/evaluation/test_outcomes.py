"""Outcomes are in the file as soon as they are told, and a second evaluation begins it anew."""

import json

from loramoe_train.evaluation.outcomes import OutcomeFiles

ENTRY = {"index": 0, "code": "x = 'é\ud800'\n", "verdict": "passed", "message": "", "seconds": 0.1}


def test_each_outcome_is_written_when_it_comes(tmp_path):
    path = tmp_path / "samples" / "humaneval.tuned.code.jsonl"
    tell = OutcomeFiles(tmp_path / "samples")
    for number in range(3):
        tell("humaneval", "tuned", {**ENTRY, "index": number})
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{**ENTRY, "index": n} for n in range(number + 1)]
    tell("humaneval", "base", ENTRY)
    assert len(path.read_text().splitlines()) == 3
    OutcomeFiles(tmp_path / "samples")("humaneval", "tuned", ENTRY)
    assert len(path.read_text().splitlines()) == 1


def test_other_processes_have_files_of_their_own(tmp_path):
    OutcomeFiles(tmp_path, process=1)("humaneval", "tuned", ENTRY)
    assert [path.name for path in tmp_path.iterdir()] == ["humaneval.tuned.code.1.jsonl"]
