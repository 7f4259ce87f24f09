"""What is written in a box or as a reference: numbers, notation that is no LaTeX, chains, words."""

import json
import pathlib

import pytest
from small_verifier import problem

from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier.references import check_references
from spiral_jax.verifier.rewards import BrokenReference, load_reward, math_reward

# The published cases of Math-Verify (huggingface/Math-Verify, tests/, MIT licence) that compare one
# expression with another, each without the sentence around it.
PUBLISHED = pathlib.Path(__file__).with_name("math_verify_cases.jsonl")
# Those of them that are not right: three false chains, and a sign.
UNEQUAL = {
    ("x = 11", "x = 5+5+1 = 7 =11"),
    (r"1 = \zzz = x = 0", "0"),
    ("z = 1 + 1 = 2", "z = 3+3 = 2"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
}
# reference | box | "=" equal, "!" not, "?" the box cannot be read, "X" the reference is refused
OWN = r"""
0.00001 | 1e-5 | =
0.00001 | 1e-05 | =
1e-05 | 0.00001 | =
1e-05 | 10^{-5} | =
1e-05 | 10^-5 | =
1e-05 | 1 \times 10^{-5} | =
1e-05 | e-5 | !
1e-05 | 1e-06 | !
10000 | 1e4 | =
10000 | 1E4 | =
10000 | 1e+4 | =
1e4 | 10000 | =
1e4 | 4e | !
1.5e3 | 1500 | =
1.5e3 | 1{,}500 | =
6.02e23 | 6.02 \times 10^{23} | =
6.02e23 | 6.02 x 10^23 | =
6.02e23 | 6.02 \times 10^{22} | !
1e400 | 10^{400} | =
(1e-3, 2) | (0.001, 2) | =
\{1e2, 5\} | \{100, 5\} | =
e^2 | e^{2} | =
2e | 2e | =
2e | 2 \cdot e | =
e-5 | e - 5 | =
pi/2 | \frac{\pi}{2} | =
pi/2 | \pi/2 | =
pi/2 | \frac{ip}{2} | !
\pi/2 | pi/2 | =
2pi | 2\pi | =
2*pi*r | 2\pi r | =
3/4 pi | \frac{3\pi}{4} | =
π/2 | \frac{\pi}{2} | =
18 dollars | 18 | =
18 dollars | \$18 | =
18 dollars | 18\text{ dollars} | =
18 dollars | 18.00 | =
18 dollars | 19 | !
18 | 18 dollars | =
5 pears | 5 | =
60 miles per hour | 60 | =
5 km/h | 5 | =
12 cm^2 | 12 | =
12 men | 12 | =
1.5 million | 1500000 | =
1.5 million dollars | 1{,}500{,}000 | =
1.5 million | 1.5 | !
2 1/2 | \frac{5}{2} | =
2 1/2 | 2.5 | =
2 1/2 | 2\frac{1}{2} | =
2 1/2 | \frac{3}{2} | !
-2 1/2 | -2.5 | =
2½ | 2.5 | =
1 1/2 cups | 1.5 | =
5/2 | 2 1/2 | =
3,5 | 3.5 | =
3,5 | 3, 5 | =
3,5 | 35 | !
3.5 | 3,5 | =
1.234,5 | 1234.5 | =
1,234 | 1234 | =
1_000 | 1000 | =
sin(x) | \sin(x) | =
sin(x) | \sin x | =
sin x | \sin(x) | =
sin(x) | \cos(x) | !
sin(x) | nis(x) | ?
sin^2(x) | \sin^2 x | =
xsin(x) | x\sin x | =
ln(2) | \ln 2 | =
ln 2 | \ln{2} | =
log_2(8) | 3 | =
sqrt(2)/2 | \frac{\sqrt{2}}{2} | =
sqrt(x+1) | \sqrt{x+1} | =
2sqrt3 | 2\sqrt{3} | =
√2 | \sqrt{2} | =
cbrt(2) | \sqrt[3]{2} | =
exp(x) | e^x | =
abs(x) | |x| | =
x**2 | x^2 | =
x² | x^2 | =
(-oo, 3) | (-\infty, 3) | =
x >= 2 | x \geq 2 | =
45° | 45 | =
theta | \theta | =
theta | hetat | !
Paris | \text{Paris} | =
Paris | paris | =
Paris | pairs | !
no solution | \text{No solution} | =
no solution | 5 | !
ACB | ABC | !
ACB | \text{ACB} | =
Paris and London | London, Paris | =
ab | ba | =
4ab | 4 | !
3t | 3 | !
3t | 3t | =
\frac{1}{3}\pi r^2 h | \frac{1}{3}\pi r^2 | !
\frac{1}{3}\pi r^2 h | \frac{\pi r^2 h}{3} | =
5 | 6=5 | !
5 | x=1=5 | !
5 | 1=5 | !
5 | x = 6 = 5 | !
5 | x = 5 | =
5 | 2+3=5 | =
5 | x=2+3=5 | =
5 | 5=5 | =
5 | y=x=5 | =
x=5 | x=1=5 | !
\{5, 6\} | x=1=5, y=6 | !
\frac{1}{3} | x = 0.33 = \frac{1}{3} | =
\frac{1}{3} | x = 0.34 = \frac{1}{3} | !
0.5 | \cos 60^\circ = 0.5 | =
180 | 3\text{ hours} = 180\text{ minutes} | =
2 | \log 100 = 2 | =
2024-01-01 | 2022 | X
3/4x | \frac{3x}{4} | X
1/2\pi | \frac{\pi}{2} | X
\frac{3x}{4} | 3/4x | =
\frac{3}{4x} | 3/4x | =
\frac{4x}{3} | 3/4x | !
\frac{\pi}{2} | 1/2\pi | =
3/4 cm | 0.75 | =
3/4cm | 0.75 | =
\text{June 20} | June 20 | ?
日本 | 中国 | !
日本 | \text{日本} | =
日 | 日本 | !
日本, 中国 | 中国 and 日本 | =
мир | Мир | =
да | нет | !
größer | \text{Größer} | =
größer | kleiner | !
größer | 3 | !
naïve | naive | !
café | café | =
São Paulo | São Paulo | =
18 рублей | 18 | =
18 | 18 рублей | =
α | \alpha | =
2α+β | 2\alpha+\beta | =
x≈3.14 | 3.14 | =
5±1 | 5\pm 1 | =
∅ | \emptyset | =
3.14 | ≈3.14 | ?
\text{June 20} | \text{june 20} | =
\text{18 dollars} | 18 | =
n is even | n | !
5 pears and 3 apples | 8 | X
2 3/2 | 3.5 | X
0x10 | 16 | X
foo(x) | 1 | X
6=5 | 5 | X
5 | 5 pears and 3 apples | ?
5 | n is five | !
0.0015 | 1.5\cdot 10^{-3} | =
500 | 1/2 \times 10^3 | =
2 \times 10^3 | 2000 | =
n is even | n is even | =
x is 5 | 5 | X
\$18 per hour | 18 | =
\$1.5 million | 1500000 | =
45\% | 45% | =
E | \text{E} | =
(A) | A | =
\frac{pi}{2} | \frac{\pi}{2} | =
AB=4, CD=5 | 4, 5 | =
12:30 | 12:30 | =
5 | \$5.00 | =
-1.5e-3 | -0.0015 | =
1e5 meters | 100000 | =
"""


@pytest.fixture(scope="module", autouse=True)
def tables():
    load_reward("math")


def verdict(reference, box):
    try:
        equal = math_reward(f"\\boxed{{{box}}}", problem(reference))
    except BrokenReference:
        return "X"
    return {True: "=", False: "!", None: "?"}[equal]


def test_own_cases_are_read_as_they_are_meant():
    cases = [line.split(" | ") for line in OWN.strip().splitlines()]
    wrong = []
    for *texts, expected in cases:
        reference, box = " | ".join(texts[:-1]), texts[-1]
        if verdict(reference, box) != expected:
            wrong.append((reference, box, expected, verdict(reference, box)))
    assert not wrong
    assert len(cases) >= 60


def test_math_verifys_published_cases_hold_but_for_four_that_are_wrong():
    cases = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    found = set()
    for case in cases:
        pair = case["reference"], case["answer"]
        if (verdict(*pair) == "=") != case["equal"]:
            found.add(pair)
    assert found == UNEQUAL
    assert len(cases) == 190


def test_references_that_cannot_be_read_are_refused_at_load_with_their_problems():
    fine = [problem(answer, f"train:{i}") for i, answer in enumerate(["5", "pi/2", "\\frac12"])]
    assert check_references(fine) == ""
    broken = [problem("2024-01-01", "train:7"), problem("3/4x", "train:8")]
    with pytest.raises(TaskError) as error:
        check_references(fine + broken)
    for part in ("2 of 5", "train:7", "2024-01-01", "train:8", "3/4x", "task.reward"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("≈3.14", "≈"),
        ("~3", "~"),
        ("#3", "#"),
        ("?", "?"),
        ("１２", "１"),
        ("3.14159...", ".."),
        ("x⁴", "⁴"),
        ("5 ℃", "℃"),
        ("-", "-"),
        ("3 + größe", "größe"),
        (r"\frac{1}{2} + größe", "größe"),
    ],
)
def test_a_reference_with_signs_that_no_rule_knows_is_refused_by_name(answer, named):
    with pytest.raises(TaskError) as error:
        check_references([problem("5", "train:6"), problem(answer, "train:7")])
    _, _, reason = str(error.value).partition(f"train:7: {answer!r}: ")
    assert "1 of 2" in str(error.value) and repr(named) in reason


def test_problems_without_an_answer_are_refused_at_load_with_the_columns_that_they_have():
    without = Problem("train:7", "?", "", {"answr": "5", "level": 1})
    with pytest.raises(TaskError, match="1 of 1 .*\n.*train:7: there is no answer.*answr, level"):
        check_references([without])


@pytest.mark.parametrize(
    ("box", "expected"),
    [("0.5", True), ("\\frac{2}{4}", True), ("7", True), ("8", False), ("...", None)],
)
def test_of_several_answers_each_is_right(box, expected):
    assert math_reward(f"\\boxed{{{box}}}", problem(["1/2", "7"])) is expected


def test_references_with_two_readings_are_named_at_load():
    notes = check_references([problem("3,5", "train:7"), problem("3, 5", "train:8")])
    assert "train:7" in notes and "3.5" in notes and "train:8" not in notes
