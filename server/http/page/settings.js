// The sampling controls, and the options of a request that they stand for.

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const element = (id) => document.getElementById(id);

// Keeps each slider and its number field equal.
export function connectSettings() {
  for (const slider of document.querySelectorAll("input[type=range]")) {
    const number = element(slider.dataset.for);
    slider.value = number.value;
    slider.addEventListener("input", () => { number.value = slider.value; });
    number.addEventListener("input", () => { slider.value = number.value; });
  }
}

// The options of a request; an empty field leaves its option unset.
export function samplingOptions() {
  const options = {};
  for (const name of NUMBERS) {
    const { value } = element(name);
    if (value !== "") options[name] = Number(value);
  }
  const lines = element("stop_strings").value.split("\n").filter((line) => line);
  if (lines.length) options.stop = lines.map((line) => line.replaceAll("\\n", "\n"));
  return options;
}
