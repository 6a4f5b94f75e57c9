"""Compare rounding to the nearest, compensated rounding and SliderQuant's windows on your own text.

    python compare_methods_on_own_text.py MODEL notes.txt held_out.txt [BITS SAMPLES LENGTH EPOCHS]

Both methods get the same calibration samples and the same format. The windows, which take EPOCHS (2 or
more), need hours where compensated rounding needs minutes; see what they will cost with
``sliderquant inspect --method slider``.
The script writes the folders ``compared-compensated`` and ``compared-slider`` and prints a table.
"""

import sys

from sliderquant import QuantizeConfig, quantize

model_folder, calibration_text, held_out_text = sys.argv[1:4]
bits, samples, length, epochs = map(int, sys.argv[4:8] or (2, 128, 2048, 20))

# Settings of the windows are refused with the other method, so they are given to one only.
own_settings = {
    "compensated": {},
    "slider": {"epochs": epochs, "lr_lora": 3e-3, "lr_lwc": 3e-2},
}
# All settings are checked before the first run starts.
configs = [
    QuantizeConfig(
        method=method,
        model=model_folder,
        calib=(calibration_text,),
        eval_text=(held_out_text,),
        out=f"compared-{method}",
        wbits=bits,
        group_size=64,
        sym=False,
        format="native",
        nsamples=samples,
        seqlen=length,
        batch_size=4,
        **settings,
    )
    for method, settings in own_settings.items()
]

perplexities = {}
for config in configs:
    # Full precision and rounding to the nearest come with every report.
    for row in quantize(config).rows:
        perplexity = next(v[0] for name, v in row.metrics.items() if "perplexity" in name)
        perplexities[row.name] = perplexity

for name, perplexity in perplexities.items():
    print(f"{name:24} {perplexity:10.3f}")
best = min((p, n) for n, p in perplexities.items() if n != "full precision")[1]
print(f"lowest after full precision: {best}")
