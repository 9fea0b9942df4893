// The page of the test provider: sends the payer's choice, then leads back to the order.
const main = document.querySelector("main");
const result = document.getElementById("result");
const words = {
  none: "等待付款 · Waiting for the payment",
  paid: "已付款 · Paid",
  failed: "付款失败，可以再试 · Failed, you may try again",
  closed: "已关闭，不能再付款 · Closed, nothing can be paid any more",
};

const show = (state) => {
  result.textContent = words[state] ?? state;
  for (const button of document.querySelectorAll("[data-result]")) {
    button.disabled = state === "paid" || state === "closed";
  }
};

const act = async (choice) => {
  if (choice === "none") {
    location.assign(main.dataset.returnTo);
    return;
  }
  try {
    const answer = await fetch(location.pathname, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ result: choice }),
    });
    if (!answer.ok) throw new Error(answer.status);
    const { state } = await answer.json();
    show(state);
    if (state === "paid") location.assign(main.dataset.returnTo);
  } catch {
    result.textContent = "没有成功，请再试一次 · That did not work, please try again";
  }
};

show(result.dataset.state);
for (const button of document.querySelectorAll("[data-result]")) {
  button.addEventListener("click", () => act(button.dataset.result));
}
