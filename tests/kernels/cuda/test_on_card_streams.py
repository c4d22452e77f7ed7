"""Streams, CUDA graphs, threads, and what a bad call leaves behind, on a card and on both tiers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ...on_card import TIERS, call, guarded, healthy, only, placed, torch
from .card_cases import problem
from .test_on_card_results import OPERATIONS, assert_right

__all__ = ["healthy"]

pytestmark = pytest.mark.cuda
CASE = "96 channels"
DTYPES = ("float32", "bfloat16")
CYCLES = 200_000_000  # of the card's clock: a tenth of a second


def prepared(operation: str, dtype: str):
    """(a problem, its inputs, room for its results)."""
    it = problem(operation, CASE, dtype)
    return it, it.inputs(placed), [guarded(shape, dtype)[0] for shape in it.result_shapes]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_work_goes_to_pytorchs_current_stream(dtype, operation, tier):
    """It waits for what is in the stream before, inputs that come late; what follows waits for it, the host not."""
    it, (x, *others), results = prepared(operation, dtype)
    with only(tier):
        call(it.operation, it.before, [x, *others], results)  # compiled and loaded
        late, stream = torch.full_like(x, torch.nan), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            late.copy_(x)
            call(it.operation, it.before, [late, *others], results)
            copies = [result.clone() for result in results]
            asynchronous = not stream.query()
        stream.synchronize()
    assert asynchronous, "the call waited for the card"
    assert_right(it, copies)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_into_a_graph_and_replayed(dtype, operation, tier):
    it, inputs, results = prepared(operation, dtype)
    with only(tier):
        call(it.operation, it.before, inputs, results)
        expected = [result.clone() for result in results]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(it.operation, it.before, inputs, results)
    for _ in range(2):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for result, before in zip(results, expected, strict=True):
            assert torch.equal(result, before)
    inputs[-1].mul_(2)  # the bias, or dy, in which every gradient is linear; a power of two changes no rounding
    graph.replay()
    for result, before in zip(results, expected, strict=True):
        assert not torch.equal(result, before)
        assert it.is_forward or torch.equal(result, 2 * before)


def test_a_transpose_is_captured_with_the_product_that_reads_it(monkeypatch):
    """The kernel's, for TF32 on warpgroups: a replay sees what the kernel has become."""
    from fastsepconv.kernels.cuda import driver, tiles

    if driver.device(0).capability != tiles.HOPPER[:2]:
        pytest.skip("the instructions of warpgroups are those of compute capability 9.0")
    monkeypatch.setenv("FASTSEPCONV_TF32", "1")
    monkeypatch.setattr(tiles, "pointwise", lambda *arguments: tiles.WARPGROUP_POINTWISE["tf32"][-1])
    it, (x, kernel, bias), results = prepared("pointwise_forward", "float32")
    bias.zero_()
    with only("fast"):
        call(it.operation, it.before, [x, kernel, bias], results)
        expected = 2 * results[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(it.operation, it.before, [x, kernel, bias], results)
    kernel.mul_(2)
    graph.replay()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads_at_once_each_on_a_stream_of_its_own(operation, tier):
    it, inputs, results = prepared(operation, "float32")
    with only(tier):
        call(it.operation, it.before, inputs, results)
        torch.cuda.synchronize()

        def run(_) -> list:
            stream, own = torch.cuda.Stream(), [torch.full_like(result, torch.nan) for result in results]
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                for _ in range(10):
                    call(it.operation, it.before, inputs, own)
            stream.synchronize()
            return own

        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(run, range(6)):
                assert all(torch.equal(ours, alone) for ours, alone in zip(found, results, strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_kernels_that_come_to_a_thread_first_seen(tier):
    """A new thread has no context of the card's; the call gives it that of PyTorch."""
    it, inputs, results = prepared("separable_forward", "float32")
    torch.cuda.synchronize()
    with only(tier), ThreadPoolExecutor(1) as pool:
        pool.submit(call, it.operation, it.before, inputs, results).result()
        torch.cuda.synchronize()
    assert_right(it, results)


class TestBadInput:
    """Each is refused by name; the card goes on, and nothing that was asked of it before is lost."""

    @pytest.fixture(autouse=True)
    def goes_on(self):
        yield
        torch.cuda.synchronize()
        it, inputs, results = prepared("separable_forward", "float32")
        call(it.operation, it.before, inputs, results)
        assert_right(it, results)

    @pytest.fixture
    def operands(self):
        shapes = ((2, 9, 8, 32), (3, 3, 32, 1), (32, 64))
        return [torch.randn(shape, device="cuda") for shape in shapes]

    def test_a_host_tensor_among_those_on_the_card(self, operands):
        import fastsepconv

        for i, name in enumerate(("x", "depthwise_kernel", "pointwise_kernel")):
            mixed = [operand.cpu() if i == at else operand for at, operand in enumerate(operands)]
            with pytest.raises(TypeError, match=f"argument `{name}`"):
                fastsepconv.separable_conv2d(*mixed)

    def test_tensors_on_two_cards(self, operands):
        import fastsepconv

        if torch.cuda.device_count() < 2:
            pytest.skip("there is one card only")
        with pytest.raises(ValueError, match=r"`depthwise_kernel`\. Expected an array on card 0"):
            fastsepconv.separable_conv2d(operands[0], operands[1].to("cuda:1"), operands[2])

    def test_dtypes_shapes_and_memory_that_do_not_fit(self, operands):
        import fastsepconv

        x, depthwise, pointwise = operands
        for name, wrong in {
            "depthwise_kernel": (x, depthwise.half(), pointwise),
            "x": (x.int(), depthwise, pointwise),
            "pointwise_kernel": (x, depthwise, pointwise[1:]),
        }.items():
            with pytest.raises((TypeError, ValueError), match=f"argument `{name}`"):
                fastsepconv.separable_conv2d(*wrong)
        with pytest.raises(ValueError, match=r"`x`\. Expected an array whose memory is contiguous"):
            fastsepconv.separable_conv2d(x[:, :, ::2], depthwise, pointwise)

    def test_more_than_the_card_holds(self):
        """A kernel's own need for memory that is not there: said with its size, and nothing is left allocated."""
        from fastsepconv.kernels.cuda import driver

        (free, _), on = torch.cuda.mem_get_info(), driver.device(0)
        for _ in range(3):
            with driver.turned_to(on), pytest.raises(RuntimeError, match="has no room for the"):
                driver.allocate(2 * free, "a test", driver.own_stream(on))
        assert torch.cuda.mem_get_info()[0] >= free // 2
