import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pictures import COLOURS, encoded, make_dataset, picture, save_dataset

from timm_ghn.data.splits import DataOptions, first_shots, load_splits
from timm_ghn.errors import ConfigError, DataError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(30), make_dataset(12, seed=1))


def test_columns_classes_and_splits_are_found(folder):
    splits = load_splits(DataOptions(str(folder), val_split='test'))
    assert splits.classes == ('red', 'green', 'blue')
    assert (len(splits.train), len(splits.val)) == (30, 12)
    assert splits.names == ('train', 'test')
    assert splits.train.labels.tolist() == [0, 1, 2] * 10
    splits = load_splits(DataOptions(str(folder), train_split='train[:50%]', val_split='train[20:]'))
    assert (len(splits.train), len(splits.val)) == (15, 10)


def test_the_test_split_is_kept_for_the_end(folder):
    splits = load_splits(DataOptions(str(folder)))
    assert (len(splits.train), len(splits.val)) == (27, 3)
    assert splits.names == ('train', '0.1 of train')
    assert len(splits.test) == 12


@pytest.mark.parametrize('changes', [{'val_split': 'test[:5]'}, {'train_split': 'train+test'}])
def test_a_test_split_that_is_used_otherwise_is_no_test_split(folder, changes):
    assert load_splits(DataOptions(str(folder), **changes)).test is None


def test_a_test_split_without_labels_is_left_out(tmp_path):
    secret = make_dataset(12).map(lambda row: {'label': -1}, features=make_dataset(1).features)
    folder = save_dataset(tmp_path / 'secret', make_dataset(30), secret)
    with pytest.warns(UserWarning, match='test split is left out: 12 of 12 rows of split .test. have no known label'):
        assert load_splits(DataOptions(str(folder))).test is None


def test_a_validation_split_goes_before_a_share_also_in_a_saved_data_set(tmp_path):
    parts = {'train': make_dataset(9), 'validation': make_dataset(6), 'test': make_dataset(12)}
    DatasetDict(parts).save_to_disk(tmp_path / 'saved')
    splits = load_splits(DataOptions(str(tmp_path / 'saved')))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.names[1]) == (9, 6, 12, 'validation')
    splits = load_splits(DataOptions(str(tmp_path / 'saved'), train_split='train+validation'))
    assert (len(splits.train), len(splits.val), splits.names[1]) == (13, 2, '0.1 of train+validation')


def pixels(split):
    return {row['image']['bytes'] for row in split.rows}


def test_a_share_is_held_out_with_a_seed(folder):
    options = [DataOptions(str(folder), val_split='0.2', seed=seed) for seed in (3, 3, 4)]
    first, second, other = map(load_splits, options)
    assert (len(first.train), len(first.val)) == (24, 6)
    assert pixels(first.val) == pixels(second.val) != pixels(other.val)
    assert not pixels(first.train) & pixels(first.val)
    assert len(pixels(first.train) | pixels(first.val)) == 30


def test_a_share_has_the_classes_in_their_proportions(tmp_path):
    rows = make_dataset(60).select([*range(0, 30, 3), *range(1, 60, 3), *range(2, 60, 3)])
    splits = load_splits(DataOptions(str(save_dataset(tmp_path / 'rare', rows)), val_split='0.2'))
    assert np.bincount(splits.train.labels).tolist() == [8, 16, 16]
    assert np.bincount(splits.val.labels).tolist() == [2, 4, 4]
    assert splits.train.labels.tolist() == sorted(splits.train.labels), 'the rows stay in their order'


def test_a_share_leaves_an_image_on_either_side(tmp_path):
    folder = str(save_dataset(tmp_path / 'few', make_dataset(6)))
    splits = load_splits(DataOptions(folder, val_split='0.001'))
    assert (len(splits.train), len(splits.val)) == (5, 1)
    with pytest.raises(DataError, match='has only the class'):
        load_splits(DataOptions(folder, val_split='0.999'))


def test_a_file_and_a_folder_per_class_are_read(tmp_path, folder):
    one = load_splits(DataOptions(str(folder / 'train-00000-of-00001.parquet')))
    assert len(one.train) + len(one.val) == 30
    for name in ('red', 'blue'):
        (tmp_path / 'images' / 'train' / name).mkdir(parents=True)
        for number in range(5):
            picture(COLOURS[name], number).save(tmp_path / 'images' / 'train' / name / f'{number}.png')
    images = load_splits(DataOptions(str(tmp_path / 'images'), val_split='0.2'))
    assert images.classes == ('blue', 'red')


def test_text_and_integers_are_labels_too(tmp_path):
    image = {'bytes': encoded(picture((9, 9, 9), 0)), 'path': None}
    for name, kind, values in (('text', 'string', ['dog', 'cat'] * 6), ('numbers', 'int64', [7, 3] * 6)):
        features = Features({'picture': Image(), 'class': Value(kind)})
        rows = Dataset.from_dict({'picture': [image] * 12, 'class': values}, features=features)
        splits = load_splits(DataOptions(str(save_dataset(tmp_path / name, rows, rows)), val_split='test'))
        assert splits.classes == tuple(map(str, sorted(set(values))))
        assert splits.train.labels.tolist() == [1, 0] * 6


def test_shots_are_the_first_of_each_class_in_order():
    labels = np.array([2, 0, 0, 1, 2, 0, 1, 1, 2])
    assert first_shots(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]
    drawn = first_shots(labels, 2, seed=1)
    assert np.bincount(labels[drawn]).tolist() == [2, 2, 2]
    assert drawn.tolist() == first_shots(labels, 2, seed=1).tolist()
    assert any(first_shots(labels, 2, seed=seed).tolist() != drawn.tolist() for seed in range(2, 9))


@pytest.mark.parametrize('val_split', ['auto', '0.1', 'test'])
def test_shots_are_the_same_whatever_is_validated_on(folder, val_split):
    splits = load_splits(DataOptions(str(folder), val_split=val_split, seed=1), shots=4)
    assert splits.train.labels.tolist() == [0, 1, 2] * 4
    assert pixels(splits.train) == {row['image']['bytes'] for row in undecoded(make_dataset(12))}
    assert len(splits.val) == (12 if val_split == 'test' else 3)
    assert not pixels(splits.train) & pixels(splits.val)


def undecoded(rows):
    return rows.cast_column('image', Image(decode=False))


def test_images_that_are_no_shots_are_needed_to_validate_on(folder):
    splits = load_splits(DataOptions(str(folder), val_split='0.5'), shots=9)
    assert (len(splits.train), len(splits.val)) == (27, 3)
    with pytest.raises(DataError, match="expected 11 images of each class, but 'red' has 10"):
        load_splits(DataOptions(str(folder)), shots=11)
    with pytest.raises(DataError, match='none can be held out .*ask for fewer shots.* val_split'):
        load_splits(DataOptions(str(folder)), shots=10)
    assert len(load_splits(DataOptions(str(folder), val_split='test'), shots=10).train) == 30


def rows(**columns):
    """A data set of four rows from values and features."""
    features = Features({name: feature for name, (feature, _) in columns.items()})
    return Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)


IMAGES = (Image(), [{'bytes': encoded(picture((9, 9, 9), 0)), 'path': None}] * 4)
LABELS = (ClassLabel(names=['a', 'b']), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ('train', 'options', 'message'),
    [
        (rows(text=(Value('string'), ['x'] * 4), label=LABELS), {}, r'image_column .*there are text, label\)'),
        (rows(image=IMAGES, mask=IMAGES, label=LABELS), {}, 'image_column to name one column'),
        (rows(image=IMAGES, fine=LABELS, coarse=LABELS), {}, 'label_column .*image, fine, coarse'),
        (rows(image=IMAGES, label=(ClassLabel(names=['a', 'b']), [0, 0, 0, 0])), {}, "only the class 'a'"),
        (rows(image=IMAGES, label=(ClassLabel(names=['a', 'b']), [0, 1, -1, 1])), {}, 'have no known label'),
        (rows(image=IMAGES, label=LABELS), {'image_column': 'picture'}, "image_column .*got 'picture'"),
        (rows(image=IMAGES, label=LABELS), {'image_column': 'label'}, "image_column .*got 'label'"),
        (rows(image=IMAGES, label=LABELS), {'label_column': 'image'}, "label_column .*got 'image'"),
        (rows(image=IMAGES, label=LABELS), {'train_split': 'training'}, "train_split 'training' is no split"),
        (rows(image=IMAGES, label=LABELS), {'val_split': 'train['}, "val_split 'train\\[' is no split"),
        (rows(image=IMAGES, label=LABELS), {'train_split': 'train[:0]'}, 'has no images'),
        (rows(image=IMAGES, label=LABELS), {'train_split': 'train[:45]', 'val_split': 'train[45:]'}, 'has no images'),
    ],
)
def test_what_is_missing_is_named(tmp_path, train, options, message):
    folder = save_dataset(tmp_path / 'bad', train, train)
    with pytest.raises(DataError, match=message):
        load_splits(DataOptions(str(folder), **options))


def test_a_validation_split_with_other_classes_is_refused(tmp_path):
    # As parquet files, datasets would cast the second to the features of the first.
    both = DatasetDict({'train': make_dataset(9), 'test': make_dataset(9, ('red', 'blue', 'green'))})
    both.save_to_disk(tmp_path / 'two')
    with pytest.raises(DataError, match='other classes'):
        load_splits(DataOptions(str(tmp_path / 'two'), val_split='test'))
    with pytest.warns(UserWarning, match='test split is left out: .*other classes'):
        assert load_splits(DataOptions(str(tmp_path / 'two'))).test is None


@pytest.mark.parametrize('place', ['missing-data-set/of-nobody', '~no-such-user/x', 'table.parquet'])
def test_a_data_set_that_is_not_there_says_what_was_expected(place, monkeypatch, tmp_path):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'table.parquet').write_bytes(b'PAR1 not a table PAR1')
    with pytest.raises(DataError, match='cannot be loaded: .*expected a name on the Hub'):
        load_splits(DataOptions(place))


@pytest.mark.parametrize(
    'options', [{'dataset': ''}, {'dataset': ['a', 'b']}, {'dataset': 'x', 'val_split': '1.5'}, {'dataset': None}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError):
        DataOptions(**options)
