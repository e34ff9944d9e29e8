"""Tasks from TensorFlow Datasets, read without TensorFlow."""

import os
import subprocess
import sys

import numpy as np
import pytest

from karploop.data.tasks import get_task
from karploop.errors import UserError

pytest.importorskip("array_record")
tfds = pytest.importorskip("tensorflow_datasets")

FIELDS = "?prompt=question&answer=answer"


class TinySums(tfds.core.GeneratorBasedBuilder):
    """Sums of two digits in two splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "value": np.int64,
            "level": np.int32,
            "odd": tfds.features.ClassLabel(names=["no", "yes"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(10)),
            "test": self._generate_examples(range(10, 13)),
        }

    def _generate_examples(self, values):
        for i in values:
            row = {"question": f"é: {i} + 1?", "answer": f"{i + 1}", "value": i + 1}
            yield i, row | {"level": 1 + i % 2, "odd": i % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinySums(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_split_with_its_fields(data_dir):
    task = get_task(f"tfds/tiny_sums{FIELDS}&difficulty=level&data_dir={data_dir}&name=tiny")
    assert task.name == "tiny"
    assert task.space(1) == task.space(2) == 5
    assert task.answer("é: 3 + 1?") == "4" and task.difficulty("é: 3 + 1?") == 2
    test = get_task(f"tfds/tiny_sums:test{FIELDS}&data_dir={data_dir}")
    assert sorted(test.prompts(1)) == ["é: 10 + 1?", "é: 11 + 1?", "é: 12 + 1?"]
    part = get_task(f"tfds/tiny_sums:train[:40%]{FIELDS}&data_dir={data_dir}")
    assert part.space(1) == 4 and part.identity != test.identity


def test_numbers_and_labels_as_answers(data_dir):
    base = f"tfds/tiny_sums?prompt=question&data_dir={data_dir}"
    assert get_task(f"{base}&answer=value").answer("é: 4 + 1?") == "5"
    assert get_task(f"{base}&answer=odd").answer("é: 4 + 1?") == "no"
    assert get_task(base).answer("é: 4 + 1?") == "5", "the field called 'answer'"


@pytest.mark.parametrize(
    "address, message",
    [
        (f"tiny_sums:trian{FIELDS}", "no split 'trian'.*Unknown split"),
        (f"tiny_sms{FIELDS}", "tiny_sms.*not found.*download_and_prepare"),
        (f"squad{FIELDS}", "no split 'train' of 'squad' can be read"),
        ("tiny_sums?prompt=qestion", "no field 'qestion'; did you mean 'question'"),
        ("tiny_sums?prompt=question&answer=anwser", "did you mean 'answer'"),
        ("tiny_sums?prompt=question&dificulty=x", "did you mean 'difficulty'"),
        (":train?prompt=question", "write 'tfds/NAME"),
        ("tiny_sums:?prompt=question", "write 'tfds/NAME"),
        ("tiny_sums?answer=answer", "write 'tfds/NAME"),
    ],
)
def test_mistakes_in_an_address(data_dir, address, message):
    with pytest.raises(UserError, match=message):
        get_task(f"tfds/{address}&data_dir={data_dir}").space(1)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_a_missing_package_is_named(data_dir, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"'{package}' is missing.*pip install"):
        get_task(f"tfds/tiny_sums{FIELDS}&data_dir={data_dir}").space(1)


def test_tensorflow_is_not_imported_even_where_it_is_installed(data_dir, tmp_path):
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    name = f"tfds/tiny_sums{FIELDS}&data_dir={data_dir}"
    code = (
        "import sys; from karploop.data.tasks import get_task; "
        f"assert get_task({name!r}).space(1) == 10; assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
