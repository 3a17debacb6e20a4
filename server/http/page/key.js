// The API key: asked for in a dialog, kept in this tab's session storage.

const STORED = "memplus-api-key";
const element = (id) => document.getElementById(id);
let asked = null;

export function apiKey() {
  return sessionStorage.getItem(STORED);
}

// Opens the dialog with a message. Resolves to whether a key was given; callers share one dialog.
export function askForKey(message) {
  asked ??= new Promise((resolve) => {
    const dialog = element("key-dialog");
    element("key-message").textContent = message;
    element("key").value = "";
    element("key-forget").hidden = !apiKey();
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asked = null;
      resolve(dialog.returnValue === "given");
    }, { once: true });
    dialog.showModal();
  });
  return asked;
}

// Connects the dialog's buttons; `changed` runs after the person opened the dialog and gave a key.
export function connectKeyDialog(changed) {
  const dialog = element("key-dialog");
  const button = element("key-button");
  const show = () => { button.hidden = false; };
  if (apiKey()) show();
  element("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(STORED, element("key").value);
    show();
    dialog.close("given");
  });
  element("key-cancel").addEventListener("click", () => dialog.close());
  element("key-forget").addEventListener("click", () => {
    sessionStorage.removeItem(STORED);
    dialog.close();
  });
  button.addEventListener("click", async () => {
    const message = apiKey() ? "A key is in use. You can replace or forget it." : "The server asks for a key.";
    if (await askForKey(message)) changed();
  });
  dialog.addEventListener("close", show);
}
