use super::*;

fn template(source: &str) -> ChatTemplate {
    let config =
        json!({ "chat_template": source, "bos_token": { "content": "<s>" }, "eos_token": "</s>" });
    ChatTemplate::from_tokenizer_config(Path::new("t"), &config, None)
        .unwrap()
        .unwrap()
}

fn chat() -> Value {
    json!([
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": "Hello" },
        { "role": "user", "content": "Bye" },
        { "role": "assistant", "content": "See you" },
    ])
}

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn spans_are_what_the_assistant_says() {
    let rendered = template(CHATML).render_with_spans(&chat(), None).unwrap();
    let said: Vec<&str> = rendered
        .assistant
        .iter()
        .map(|span| &rendered.text[span.clone()])
        .collect();
    assert_eq!(said, ["Hello<|im_end|>\n", "See you<|im_end|>\n"]);
    assert!(
        rendered
            .text
            .starts_with("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    );
}

#[test]
fn generation_blocks_give_the_spans() {
    let source = "{{ bos_token }}{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\nA: {{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}\nU: {{ m.content }}\n{%- endif %}\n{% endfor %}";
    let rendered = template(source).render_with_spans(&chat(), None).unwrap();
    // What transformers 5.24 renders, with its assistant mask.
    assert_eq!(rendered.text, "<s>U: HiA: Hello</s>U: ByeA: See you</s>");
    let said: Vec<&str> = rendered
        .assistant
        .iter()
        .map(|span| &rendered.text[span.clone()])
        .collect();
    assert_eq!(said, ["A: Hello</s>", "A: See you</s>"]);
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let source =
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}";
    let error = template(source)
        .render_with_spans(&chat(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("message 2"), "{error}");
}

#[test]
fn python_is_spoken() {
    let render = |source: &str| {
        template(source).render(
            &chat(),
            Some(&json!([{ "a": [1, true, null], "b": "é<" }])),
            false,
        )
    };
    assert_eq!(
        render("{{ tools | tojson }}").unwrap(),
        r#"[{"a": [1, true, null], "b": "é<"}]"#
    );
    assert_eq!(
        render("{{ tools[0].a | tojson(indent=2) }}").unwrap(),
        "[\n  1,\n  true,\n  null\n]"
    );
    assert_eq!(
        render("{{ ' x y '.strip().split(' ')[-1].upper() }}").unwrap(),
        "Y"
    );
    assert_eq!(
        render("{{ messages[0].content.startswith('H') and not messages[0].get('x') }}").unwrap(),
        "True"
    );
    assert_eq!(
        render("{{ none }} {{ missing }}|{{ [true, none, 'a'] }}").unwrap(),
        "None |[True, None, 'a']"
    );
    assert_eq!(render("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}").unwrap(), "user");
    assert_eq!(render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}").unwrap(), "4");
    let year: u32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2024);
    let error = render("{{ raise_exception('Roles must alternate') }}")
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("refuses these messages: Roles must alternate"),
        "{error}"
    );
}

#[test]
fn the_source_is_found_where_hugging_face_puts_it() {
    let named = json!({ "chat_template": [{ "name": "tool_use", "template": "T" }, { "name": "default", "template": "D" }] });
    let open = |config: &Value, file: Option<&str>| {
        ChatTemplate::from_tokenizer_config(Path::new("t"), config, file.map(str::to_owned))
            .map(|t| t.map(|t| t.source().to_owned()))
    };
    assert_eq!(open(&named, None).unwrap().unwrap(), "D");
    assert_eq!(open(&named, Some("F")).unwrap().unwrap(), "F");
    assert_eq!(open(&json!({}), None).unwrap(), None);
    let error = open(&json!({ "chat_template": "{% if %}" }), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot be read"), "{error}");
}
