import pytest

from medusa_exp.config import TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json
from medusa_exp.tree import Tree, chain
from medusa_exp.tree.calibration import choose_tree, heads_sha256

#      0
#     / \
#    1   4        ranks: 1 and 2 are first guesses, 3 and 4 second ones
#   / \
#  2   3
HAND = Tree((-1, 0, 1, 1, 0), (-1, 0, 0, 1, 1))


def test_buffers_of_a_hand_written_tree():
    assert HAND.depths.tolist() == [0, 1, 2, 2, 1]
    assert HAND.depth == 2
    assert HAND.paths == [(), (0,), (0, 0), (0, 1), (1,)]
    assert HAND.mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_paths_in_any_order_give_the_same_tree():
    assert Tree.from_paths([[1], [0, 1], [0], [0, 0]]) == HAND


def test_the_likeliest_path_comes_first():
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0], [0, 0, 0]])
    assert tree.paths[:4] == [(), (0,), (0, 0), (0, 0, 0)]


def test_chain():
    assert chain(3) == Tree((-1, 0, 1, 2), (-1, 0, 0, 0))
    assert len(chain(0)) == 1


def test_json_round_trip(tmp_path):
    HAND.save(tmp_path / "tree.json")
    assert read_json(tmp_path / "tree.json") == {
        "parents": [-1, 0, 1, 1, 0],
        "ranks": [-1, 0, 0, 1, 1],
    }
    assert Tree.load(tmp_path / "tree.json") == HAND


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ((), (), "root"),
        ((0,), (-1,), "root"),
        ((-1, 1), (-1, 0), "before"),
        ((-1, 0, 0), (-1, 0, 0), "share a rank"),
        ((-1, 0), (-1, -2), "negative"),
        ((-1, 0), (-1,), "as many"),
    ],
)
def test_what_is_no_tree(parents, ranks, message):
    with pytest.raises(ValueError, match=message):
        Tree(parents, ranks)


def test_a_path_without_its_parent():
    with pytest.raises(ValueError, match=r"\[1, 0\] has no parent \[1\]"):
        Tree.from_paths([[0], [1, 0]])


def test_the_references_tree(tmp_path):
    tree = choose_tree(TreeConfig(kind="medusa_63"), tmp_path, num_heads=4)
    assert len(tree) == 64
    assert tree.depth == 4
    assert len(set(range(64)) - set(tree.parents)) == 42  # leaves


def test_a_tree_deeper_than_the_heads(tmp_path):
    with pytest.raises(UserError, match=r"tree=medusa_63 is 4 guesses deep, and there are 2"):
        choose_tree(TreeConfig(kind="medusa_63"), tmp_path, num_heads=2)


def test_no_calibration_yet(tmp_path):
    with pytest.raises(UserError, match="run stage calibrate"):
        choose_tree(TreeConfig(), tmp_path, num_heads=2)


def test_a_calibration_without_heads(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors is no file"):
        heads_sha256(tmp_path)


@pytest.mark.parametrize(("lookup", "expected"), [(None, 5), (0, 0), (2, 2)])
def test_a_custom_tree_keeps_the_looked_up_nodes_of_its_file(tmp_path, lookup, expected):
    """As when tree.path is the tree.json of another run: what it decoded with is not dropped."""
    Tree((-1, 0), (-1, 0), num_lookup=5).save(tmp_path / "tree.json")
    settings = TreeConfig(kind="custom", path=str(tmp_path / "tree.json"), lookup=lookup)
    assert choose_tree(settings, tmp_path, num_heads=2).num_lookup == expected
