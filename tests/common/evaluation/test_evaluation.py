"""Estimators against enumeration, answers through crashes, the report against a table made by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.evaluation import (
    Answer,
    AnswerFile,
    Response,
    bootstrap,
    pass_at_k,
    stratified_bootstrap,
    summarise,
)

SETTINGS = {"template": "no", "seed": 0}


def answer(uid: str, verdicts: str, *, set_name: str = "s", tokens: int = 10) -> Answer:
    """One response per letter: c(orrect), w(rong), u(nformatted), t(runcated and unformatted), v (unverified)."""
    names = {"c": "correct", "w": "wrong", "u": "unformatted", "t": "unformatted", "v": "unverified"}
    responses = tuple(
        Response(
            text="é\n",
            tokens=tokens + index,
            finish="length" if letter == "t" else "stop",
            verdict=names[letter],
            extracted=None if letter in "ut" else "1",
            reward=float(letter == "c"),
        )
        for index, letter in enumerate(verdicts)
    )
    return Answer(set_name, uid, "1+1=", "2", responses)


class TestPassAtK:
    @pytest.mark.parametrize("n", range(1, 7))
    def test_is_the_share_of_subsets_with_a_correct_response(self, n):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            solved = sum(any(index < c for index in subset) for subset in subsets)
            assert pass_at_k(n, c, k) == pytest.approx(solved / len(subsets), abs=1e-12)

    def test_is_unbiased(self):
        p, n, k = 0.3, 8, 4
        expected = sum(
            float(np.prod([p if bit else 1 - p for bit in bits])) * pass_at_k(n, sum(bits), k)
            for bits in itertools.product((0, 1), repeat=n)
        )
        assert expected == pytest.approx(1 - (1 - p) ** k)

    @pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
    def test_refuses_what_does_not_exist(self, n, c, k):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(n, c, k)


class TestBootstrap:
    def test_agrees_with_the_normal_approximation(self):
        values = [1.0] * 200 + [0.0] * 200
        found = bootstrap(values)
        assert found.mean == 0.5
        assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)

    def test_covers_the_truth_as_often_as_it_says(self):
        rng = np.random.default_rng(5)
        draws = rng.random((300, 60)) < 0.4
        hits = 0
        for seed, draw in enumerate(draws):
            found = bootstrap(draw.astype(float).tolist(), resamples=400, seed=seed)
            hits += found.low <= 0.4 <= found.high
        assert 0.90 <= hits / 300 <= 0.98

    @settings(max_examples=50, deadline=None)
    @given(sets=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=30), min_size=1, max_size=4))
    def test_bounds_are_ordered_and_within_the_data(self, sets):
        found = stratified_bootstrap(sets, resamples=50)
        assert found.mean == pytest.approx(np.mean([np.mean(values) for values in sets]))
        lowest, highest = (np.mean([pick(values) for values in sets]) for pick in (min, max))
        assert lowest - 1e-9 <= found.low <= found.high <= highest + 1e-9

    def test_same_seed_same_interval(self):
        values = np.random.default_rng(0).random(40).tolist()
        assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)

    def test_small_sets_count_as_much_as_large_ones(self):
        assert stratified_bootstrap([[1.0] * 2, [0.0] * 100]).mean == 0.5

    def test_nothing_to_resample(self):
        with pytest.raises(ValueError, match="no answers"):
            bootstrap([])


class TestAnswerFile:
    def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(self, tmp_path):
        file = AnswerFile(tmp_path, SETTINGS)
        for uid in "abc":
            file.append(answer(uid, "cw"))
        file.close()
        whole = (tmp_path / "responses.jsonl").read_bytes()
        ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
        for cut in range(0, len(whole) + 1, 7):
            (tmp_path / "responses.jsonl").write_bytes(whole[:cut])
            file = AnswerFile(tmp_path, SETTINGS)
            kept = sum(end <= cut for end in ends)
            assert [key[1] for key in file.answers] == list("abc")[:kept]
            file.append(answer("z", "c"))
            file.close()
            assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == kept + 1

    def test_other_settings_are_refused_by_name(self, tmp_path):
        AnswerFile(tmp_path, SETTINGS).close()
        AnswerFile(tmp_path, SETTINGS).close()
        with pytest.raises(UserError, match=r"^--out: .* holds answers with template = 'no', not 'r1'"):
            AnswerFile(tmp_path, SETTINGS | {"template": "r1"})

    def test_reads_back_what_was_written(self, tmp_path):
        file = AnswerFile(tmp_path, SETTINGS)
        file.append(answer("a", "cwutv"))
        file.close()
        assert AnswerFile(tmp_path, SETTINGS).answers == {("s", "a"): answer("a", "cwutv")}

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"^--out: cannot write"):
            AnswerFile(tmp_path / "file" / "below", SETTINGS)


class TestReport:
    def answers(self) -> list[Answer]:
        one = [answer("a", "cccw"), answer("b", "wwwu"), answer("c", "ctvw", tokens=20)]
        return [*one, answer("a", "c", set_name="/some/where/t.jsonl", tokens=7)]

    def test_against_a_table_made_by_hand(self):
        report = summarise(self.answers(), resamples=200)
        s, t = report.sets
        assert (s.questions, s.samples, t.questions, t.samples) == (3, 4, 1, 1)
        assert s.accuracy.mean == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
        assert s.pass_at == pytest.approx({1: 1 / 3, 2: (1 + 0 + 1 / 2) / 3, 4: 2 / 3})
        assert s.tokens_mean == pytest.approx((46 + 46 + 86) / 12)
        assert s.tokens_max == 23
        assert s.formatted == pytest.approx(10 / 12)
        assert s.truncated == s.unverified == pytest.approx(1 / 12)
        assert report.average.mean == pytest.approx((1 / 3 + 1) / 2)

    def test_order_of_arrival_does_not_matter(self):
        answers = self.answers()[:3]
        assert summarise(answers, resamples=99) == summarise(answers[::-1], resamples=99)

    def test_every_form_tells_the_same(self):
        report = summarise(self.answers(), resamples=50)
        header, *rows = report.rows()
        assert len({len(row) for row in (header, *rows)}) == 1
        assert [row[0] for row in rows] == ["s", "t", "average"]
        assert rows[0][2] == "33.3"
        assert report.metrics()["t/accuracy"] == 1.0
        assert report.metrics()["s/pass_at_4"] == pytest.approx(2 / 3)
        assert json.loads(json.dumps(report.as_json()))["sets"]["s"]["accuracy"]["mean"] == pytest.approx(
            1 / 3
        )
        assert report.markdown().count("\n") == 5

    def test_no_answers(self):
        with pytest.raises(ValueError, match="no answers"):
            summarise([])
