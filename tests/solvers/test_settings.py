import pytest
import torch

from diffopt import Settings, SettingsError


def test_defaults_and_copies():
    settings = Settings()
    assert settings.tolerance_for(torch.float64) == 1e-9 and settings.tolerance_for(torch.float32) == 1e-5
    assert settings.weak_tolerance_for(torch.float64) == 1e-7 and settings.weak_tolerance_for(torch.float32) == 1e-3
    changed = settings.replace(tolerance=1e-6, weak_tolerance=1e-4)
    assert changed.tolerance_for(torch.float32) == 1e-6 and changed.weak_tolerance_for(torch.float64) == 1e-4
    assert settings.tolerance is None and changed != settings and changed == changed.replace()
    with pytest.raises(AttributeError):
        settings.tolerance = 1.0


def test_the_text_of_settings_says_all_of_them():
    changed = Settings(
        tolerance=1.1e-7, max_iterations=7, kink_rule="central", weak_tolerance=1e-5, polish=False, executor="torch"
    )
    for settings in (Settings(), changed, Settings(sync=False)):
        assert Settings.read(settings.text) == settings
    assert Settings().text != changed.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(tol=1e-3), "Unknown setting 'tol'. Expected one of tolerance, max_iterations, kink_rule"),
        (dict(tolerance=0.0), "`tolerance` = 0.0 is out of range. Expected None or a number between 0 and 1"),
        (dict(tolerance="1e-6"), "`tolerance` = '1e-6'.*None or a number between 0 and 1"),
        (dict(tolerance=torch.tensor(1e-6)), "`tolerance` = tensor.*None or a number between 0 and 1"),
        (dict(tolerance=float("nan")), "`tolerance` = nan"),
        (dict(max_iterations=0), "`max_iterations` = 0.*whole number >= 1"),
        (dict(max_iterations=2.9), "`max_iterations` = 2.9.*whole number >= 1"),
        (dict(max_iterations="5"), "`max_iterations` = '5'"),
        (dict(max_iterations=True), "`max_iterations` = True"),
        (dict(weak_tolerance="a"), "`weak_tolerance` = 'a'"),
        (dict(polish="no"), "`polish` = 'no'.*True or False"),
        (dict(sync=None), "`sync` = None.*True or False"),
        (dict(relaxation="x"), "`relaxation` = 'x'.*None or a positive number"),
        (dict(kink_rule="left"), "`kink_rule` = 'left'.*'inactive', 'active', 'central', 'minimum_norm'"),
        (dict(weak_tolerance=2.0), "`weak_tolerance` = 2.0"),
        (
            dict(selection="minimum_norm", relaxation=0.1),
            "Expected None where there is a relaxation, and under the kink",
        ),
        (
            dict(selection="minimum_norm", kink_rule="nan"),
            "Expected None where there is a relaxation, and under the kink",
        ),
        (dict(reduction="lu"), "`reduction` = 'lu'.*'auto', 'dual', 'diagonal', 'primal'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(SettingsError, match=message):
        Settings(**values)
