"""PEFT reads what lorajax writes, live: needs torch, transformers and peft.

The default run holds the same files, as fixtures, against the logits that PEFT gave for them: see
tests/adapters/test_peft_files.py.
"""

import pathlib
import sys

import numpy as np
import pytest

pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package, reason=f"{package} is missing: install the extra 'benchmark'.")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import make_fixtures  # noqa: E402
import tiny_models  # noqa: E402
import written_cases  # noqa: E402

from lorajax import adapters  # noqa: E402


@pytest.mark.parametrize(("family", "case"), written_cases.PAIRS)
def test_peft_gives_the_logits_of_what_is_written(family, case, tmp_path):
    adapted = written_cases.make(family, case)
    adapters.save_peft(adapted, tmp_path)
    torch_logits, inputs = make_fixtures.logits_of_written(family, tmp_path)
    ours = tiny_models.logits(adapted, inputs[tiny_models.INPUTS[family]].numpy())
    base = tiny_models.logits(adapters.remove(adapted), inputs[tiny_models.INPUTS[family]].numpy())
    assert float(np.max(np.abs(ours - base))) > 1e-3
    np.testing.assert_allclose(torch_logits, ours, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family, cases in make_fixtures.CASES.items() for case in cases],
)
def test_what_peft_writes_is_read(family, case, tmp_path):
    want, inputs = make_fixtures.write_case(family, case, tmp_path, seed=7)
    model = tiny_models.load(written_cases.FIXTURES / family)
    ours = tiny_models.logits(
        adapters.load_peft(model, tmp_path / case), inputs[tiny_models.INPUTS[family]].numpy()
    )
    np.testing.assert_allclose(ours, want, atol=1e-5)
