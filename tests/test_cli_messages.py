"""The parser's reports, as jsonargparse words them, and the sentence that is made of each."""

import pytest

from lightning_sfn.cli_messages import one_sentence

UNION = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[pytorch_lightning.callbacks.callback.Callback], <class 'NoneType'>]
  Errors:
    - {complaint}
    - Not a valid subclass of Callback
      Subclass types expect one of:
      - a class path (str)
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [{{'class_path': 'pytorch_lightning.callbacks.EarlyStopping'}}]"""

EARLY_STOPPING = "Problem with given class_path 'pytorch_lightning.callbacks.EarlyStopping':\n        "
OPTIMIZER = (
    "Problem with given class_path 'pytorch_lightning.callbacks.EarlyStopping':\n        Parser key \"optimizer\":\n"
    "          Type typing.Callable expects a function or a callable class: {complaint}. "
    "Got value: Namespace(class_path='torch.optim.{name}', init_args=Namespace(momentums=0.1))"
)


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        (
            EARLY_STOPPING + "Option 'patienc' is not accepted",
            "trainer.callbacks: EarlyStopping has no option 'patienc'; did you mean 'patience'?",
        ),
        (
            EARLY_STOPPING + "Parser key \"patience\":\n          Expected a <class 'int'>. Got value: x",
            "trainer.callbacks.patience: expected int, got 'x'",
        ),
        (
            EARLY_STOPPING + "Parser key \"mode\":\n          Expected a typing.Literal['min', 'max']. Got value: mid",
            "trainer.callbacks.mode: expected one of ['min', 'max'], got 'mid'",
        ),
        (
            "Expected a dot import path string: Nobody",
            "trainer.callbacks: there is no class 'Nobody': check the spelling, or give the full import path of the "
            "class",
        ),
        (
            OPTIMIZER.format(complaint="module 'torch.optim' has no attribute 'SGDD'", name="SGDD"),
            "trainer.callbacks.optimizer: there is no class 'torch.optim.SGDD': check the spelling, or give the full "
            "import path of the class",
        ),
        (
            OPTIMIZER.format(complaint="Option 'momentums' is not accepted", name="SGD"),
            "trainer.callbacks.optimizer: SGD has no option 'momentums'; did you mean 'momentum'?",
        ),
        (
            "Import path torch.nn.Linear does not correspond to a subclass of Callback",
            "trainer.callbacks: 'torch.nn.Linear' is not a Callback: name a class that is one",
        ),
    ],
)
def test_finds_the_mistake_in_the_dump(complaint: str, expected: str) -> None:
    assert one_sentence(UNION.format(complaint=complaint)) == expected


def test_option_without_a_near_miss_lists_what_there_is() -> None:
    report = UNION.format(
        complaint="Problem with given class_path 'torch.nn.Dropout':\n        Option 'q9' is not accepted"
    )
    assert one_sentence(report) == "trainer.callbacks: Dropout has no option 'q9'; its options are p, inplace"


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("unrecognized arguments: --foo 3", "unrecognized arguments: --foo 3"),
        ("Problems parsing config: while\n  in line 11", "Problems parsing config: while in line 11"),
        ("", ""),
    ],
)
def test_other_reports_stay_whole_on_one_line(report: str, expected: str) -> None:
    assert one_sentence(report) == expected


def test_a_class_that_refuses_a_value_is_heard_before_the_type_it_is_not() -> None:
    report = UNION.format(
        complaint="Does not validate against any of the Union subtypes\n"
        "      Subtypes: [<class 'str'>, <class 'lightning_sfn.newton.preconditioner.Preconditioner'>]\n"
        "      Errors:\n"
        "        - Expected a <class 'str'>\n"
        "        - probes is -3, but a number of at least 0 is expected.\n"
        "        - Expected a <class 'NoneType'>"
    )
    assert one_sentence(report) == "trainer.callbacks: probes is -3, but a number of at least 0 is expected."
    alone = UNION.format(complaint="Expected a <class 'str'>")
    assert one_sentence(alone).startswith("trainer.callbacks: expected str")
