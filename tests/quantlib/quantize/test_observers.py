import torch

from quantlib.quantize import observers


def test_percentile_cuts_off_one_value_in_ten_thousand():
    observer = observers.PercentileObserver()
    observer(torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([50.0])]))
    scale, _ = observer.calculate_qparams()
    assert 0.9 < float(scale) * 255 < 1.2


def test_mse_range_is_the_best_of_a_brute_force_search():
    torch.manual_seed(0)
    x = torch.randn(50_000) ** 3
    observer = observers.MSEObserver(reduce_range=True)
    observer(x)

    def error(scale: float, zero_point: int) -> float:
        return float((torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 127) - x).square().mean())

    scale, zero_point = observer.calculate_qparams()
    ends = torch.linspace(1, float(x.abs().max()), 60)
    best = min(error(float(2 * end / 127), 64) for end in ends)
    assert error(float(scale), int(zero_point)) < 1.03 * best


def test_mse_cuts_off_no_part_of_an_even_distribution():
    observer = observers.MSEObserver()
    observer(torch.linspace(0, 2, 10_000))
    scale, zero_point = observer.calculate_qparams()
    assert abs(float(scale) * 255 - 2) < 0.03
    assert int(zero_point) == 0
