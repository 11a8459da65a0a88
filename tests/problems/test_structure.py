import pytest
import torch

from diffopt import ParameterError, absent, fixed, given, learned
from diffopt.problems.structure import declare


def test_declarations():
    value = torch.ones(2, 2)
    assert learned(value).kind == "learned" and learned(value).value() is value
    assert fixed(0.5).value() == 0.5 and learned(1).value().dtype == torch.get_default_dtype()
    pair = fixed((torch.ones(2), torch.ones(2, 1)), form="diagonal_plus_low_rank")
    assert pair.part_names("Q") == ("Q_diagonal", "Q_factor") and len(pair.value()) == 2
    assert declare(None).kind == absent().kind == "absent"
    assert declare(given()).kind == "given" and declare(value).kind == "fixed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: given("triangular"), "Unknown matrix form 'triangular'.*'diagonal'"),
        (lambda: learned([1.0, 2.0]), r"must be a torch tensor or a number, got list.*torch.as_tensor"),
        (lambda: fixed(torch.ones(2).long()), "must be floating point, got torch.int64"),
        (lambda: fixed(torch.ones(2), form="diagonal_plus_low_rank"), r"takes a pair \(diagonal, factor\), got Tensor"),
        (lambda: fixed((torch.ones(2),), form="diagonal_plus_low_rank"), "takes a pair"),
    ],
)
def test_bad_declarations(make, message):
    with pytest.raises(ParameterError, match=message):
        make()
