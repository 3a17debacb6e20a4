// The switch between light and dark; without a choice, the system's setting counts.

const STORED = "memplus-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

// Connects the button; `changed` runs whenever the colours change.
export function connectTheme(button, changed) {
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const apply = () => {
    button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
    button.title = button.getAttribute("aria-label");
    changed();
  };
  const chosen = localStorage.getItem(STORED);
  if (chosen) root.dataset.theme = chosen;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem(STORED, root.dataset.theme);
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}
